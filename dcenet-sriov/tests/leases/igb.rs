//! Leases on a real kernel with an adapter: QEMU's igb in the guest. What a function is, iproute2 and sysfs tell.

mod cost;

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use dcenet_core::netns::NetNs;
use dcenet_core::test_support::{Rung, TestHost, TestNetNs, effort, ping, require};
use dcenet_sriov::kernel::{Kernel, LinuxKernel, Namespace, NetdevChange, VfChange, VfRate, VfVlan};
use dcenet_sriov::lease::{LeaseError, Leases, Outcome, Released, VfId, Wanted};
use dcenet_sriov::test_support::guest::IgbPort;
use dcenet_sriov::test_support::{Fault, FlakyKernel};
use tempfile::TempDir;

use crate::world::{mac, owner};

/// A guest's port with two functions, and a host with pods.
struct Guest {
    host: TestHost,
    state: TempDir,
    vf: VfId,
    home: String,
    /// Last, so that what is in pods comes back before it goes.
    port: IgbPort,
}

impl Guest {
    fn new() -> Self {
        Self::with(IgbPort::with(2))
    }

    /// One whose function's driver has spoken with its port's.
    fn acquainted() -> Self {
        let port = IgbPort::with(2);
        port.acquaint(port.vf(0));
        Self::with(port)
    }

    fn with(port: IgbPort) -> Self {
        let vf = port.vf(0);
        let home = port.told(vf);
        Self { host: TestHost::new(), state: TempDir::new().unwrap(), vf, home, port }
    }

    fn leases(&self) -> Leases {
        leases(self.port.kernel.clone(), self.state.path())
    }

    fn assert_home(&self, when: &str) {
        assert_eq!(self.port.told(self.vf), self.home, "{when}");
    }

    fn is_home(&self) -> bool {
        self.port.told(self.vf) == self.home
    }

    fn recover(&self) -> Outcome {
        self.leases().recover(|_| false).unwrap().pop().map_or(Outcome::Free, |recovered| recovered.outcome)
    }

    /// A committed lease of a pod that then does what root can do to its device.
    fn add(&self, pod: &TestNetNs) -> u64 {
        let incarnation = add(&self.leases(), self.vf, pod.path()).unwrap();
        let said = pod.sh("ip -d link show net1");
        for part in ["02:00:00:00:00:aa", "mtu 1400", ",UP", "ALLMULTI"] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let port = self.port.told(self.vf);
        for part in ["port address: \"02:00:00:00:00:aa\"", "\"vlan\":100", "port spoofchk: false", "port trust: true"]
        {
            assert!(port.contains(part), "{part}: {port}");
        }
        pod.sh("ip link set net1 down; ip link set net1 name mine; \
             ip link set mine alias tenants mtu 1300 address 02:00:00:00:00:99 promisc on up; \
             ip link property add dev mine altname also-mine");
        incarnation
    }

    fn release(&self, incarnation: u64) -> Released {
        self.leases().release(&owner("a"), self.vf.address, incarnation).unwrap()
    }
}

fn leases(kernel: Arc<dyn Kernel>, state: &Path) -> Leases {
    Leases::open(kernel, state).unwrap().with_patience(Duration::from_secs(120))
}

/// As much as the driver can do.
pub(crate) fn wanted() -> Wanted {
    Wanted {
        port: VfChange {
            mac: Some(mac(0xaa)),
            vlan: Some(VfVlan { id: Some(100.try_into().unwrap()), qos: 3, ..VfVlan::default() }),
            rate: Some(VfRate { min: 0, max: 500 }),
            spoofchk: Some(false),
            trust: Some(true),
            ..VfChange::default()
        },
        mtu: Some(1400.try_into().unwrap()),
        all_multicast: Some(true),
        ..Wanted::default()
    }
}

fn add(leases: &Leases, vf: VfId, pod: &Path) -> Result<u64, LeaseError> {
    let mut lease = leases.prepare(&owner("a"), vf, &wanted())?;
    lease.move_to(pod, &"net1".parse().unwrap())?;
    lease.commit()
}

/// What root can do to the device, with as few starts of programs as can be.
fn meddle(kernel: &LinuxKernel, vf: VfId, pod: &Path) {
    let pod = Namespace::Path(pod.to_owned());
    let device = kernel.netdevs(&pod, vf.address).unwrap().pop().unwrap();
    let set = |change: NetdevChange| kernel.configure_netdev(&pod, device.index, &change).unwrap();
    set(NetdevChange { up: Some(false), ..NetdevChange::default() });
    set(NetdevChange {
        name: Some("mine".parse().unwrap()),
        alias: Some("tenant's".to_owned()),
        mac: Some(mac(0x99)),
        mtu: Some(1300.try_into().unwrap()),
        promisc: Some(true),
        up: Some(true),
        ..NetdevChange::default()
    });
    kernel.add_alternative_name(&pod, device.index, "also-mine").unwrap();
}

#[test]
fn hundreds_of_pods_leave_it_to_the_byte_as_it_was() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let pod = guest.host.new_pod();
    let leases = guest.leases();
    for round in 0..effort(40, 40, 1_000) {
        let incarnation = add(&leases, guest.vf, pod.path()).unwrap();
        meddle(&guest.port.kernel, guest.vf, pod.path());
        let released = leases.release(&owner("a"), guest.vf.address, incarnation).unwrap();
        assert!(matches!(released, Released::Clean), "round {round}: {released:?}");
        guest.assert_home(&format!("round {round}"));
    }
    // A pod that asks for nothing changes nothing either (bug 9).
    let lease = leases.prepare(&owner("a"), guest.vf, &Wanted::default()).unwrap();
    let incarnation = lease.commit().unwrap();
    guest.assert_home("asked for nothing");
    assert!(matches!(guest.release(incarnation), Released::Clean));
    guest.assert_home("asked for nothing");
}

/// The twin: what the kernel alone brings back.
#[test]
fn a_namespace_that_ends_with_it_gives_it_back_clean() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    for taken in [false, true] {
        let pod = guest.host.new_pod();
        let incarnation = guest.add(&pod);
        if taken {
            // The kernel calls it dev<ifindex> then (`default_device_exit_net` in net/core/dev.c).
            dcenet_sriov::test_support::guest::sh("ip link add mine type veth peer name also0");
        }
        drop(pod);
        let device = guest.port.device(guest.vf.address);
        assert_eq!(device.name.as_str() == "mine", !taken, "{device:?}");
        assert!(!guest.is_home());
        let released = guest.release(incarnation);
        assert!(matches!(released, Released::Clean), "{released:?}");
        guest.assert_home("released");
        if taken {
            dcenet_sriov::test_support::guest::sh("ip link delete mine");
        }
    }
}

/// Nobody waited for the kernel to end the namespace: the device is on its way.
#[test]
fn a_release_waits_for_a_device_that_is_on_its_way() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let pod = guest.host.new_pod();
    let incarnation = guest.add(&pod);
    drop(pod);
    let released = guest.release(incarnation);
    assert!(matches!(released, Released::Clean), "{released:?}");
    guest.assert_home("released");
}

#[test]
fn a_namespace_that_somebody_holds_hides_it_until_recovery_finds_it() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let pod = guest.host.new_pod();
    let incarnation = guest.add(&pod);
    let held = NetNs::open(pod.path()).unwrap();
    drop(pod);
    let impatient = guest.leases().with_patience(Duration::from_millis(200));
    let released = impatient.release(&owner("a"), guest.vf.address, incarnation).unwrap();
    let hidden = |errors: &[LeaseError]| errors.iter().any(|error| matches!(error, LeaseError::Hidden { .. }));
    assert!(matches!(&released, Released::Quarantined(errors) if hidden(errors)), "{released:?}");
    let refused = impatient.prepare(&owner("b"), guest.vf, &Wanted::default()).map(drop);
    assert!(matches!(refused, Err(LeaseError::Quarantined { .. })), "{refused:?}");
    drop(held);
    // The kernel ends the namespace in its own time, and a recovery looks once.
    let begin = Instant::now();
    let outcome = loop {
        match guest.recover() {
            Outcome::Quarantined(_) if begin.elapsed() < Duration::from_secs(60) => sleep(Duration::from_millis(100)),
            outcome => break outcome,
        }
    };
    assert!(matches!(outcome, Outcome::Restored), "{outcome:?}");
    guest.assert_home("recovered");
    assert!(matches!(guest.recover(), Outcome::Free));
}

#[test]
fn a_function_whose_driver_was_bound_anew_under_the_pod_is_restored() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let pod = guest.host.new_pod();
    let incarnation = guest.add(&pod);
    let (kernel, address) = (&guest.port.kernel, guest.vf.address);
    kernel.unbind(address).unwrap();
    kernel.bind(address, "igbvf").unwrap();
    // Bug 18: it is in the host's namespace now.
    assert!(pod.link("mine").is_none());
    guest.port.device(address);
    assert!(!guest.is_home());
    let released = guest.release(incarnation);
    assert!(matches!(released, Released::Clean), "{released:?}");
    guest.assert_home("released");
}

/// The twin is trusted. The port is asked, for it filters: igbvf itself takes an address that its port refuses where its
/// last tenant had that (`e1000_rar_set_vf` in drivers/net/ethernet/intel/igbvf/vf.c falls back to the address of its last
/// reset).
#[test]
fn a_tenant_without_trust_keeps_the_address_that_it_was_given() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::acquainted();
    let pod = guest.host.new_pod();
    let inside = Namespace::Path(pod.path().to_owned());
    let leases = guest.leases();
    let kernel = &guest.port.kernel;
    for trusted in [false, true, false] {
        let port = VfChange { mac: Some(mac(0xaa)), trust: Some(trusted), ..VfChange::default() };
        let mut lease = leases.prepare(&owner("a"), guest.vf, &Wanted { port, ..Wanted::default() }).unwrap();
        let device = lease.move_to(pod.path(), &"net1".parse().unwrap()).unwrap();
        let incarnation = lease.commit().unwrap();
        let other = NetdevChange { mac: Some(mac(0x99)), ..NetdevChange::default() };
        let answer = kernel.configure_netdev(&inside, device.index, &other);
        assert!(!trusted || answer.is_ok(), "{answer:?}");
        let told = kernel.vf(guest.port.index, guest.vf.index).unwrap().mac;
        assert_eq!(told, mac(if trusted { 0x99 } else { 0xaa }), "trusted: {trusted}, {answer:?}");
        assert!(matches!(guest.release(incarnation), Released::Clean));
        guest.assert_home("released");
    }
}

/// A function that was given back works for the next pod: two of one port reach each other.
#[test]
fn functions_that_were_given_back_carry_the_next_pods_frames() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let leases = guest.leases();
    let pods = [guest.host.new_pod(), guest.host.new_pod()];
    let vfs = [guest.port.vf(0), guest.port.vf(1)];
    // See the limits in the documentation of the module: a function without any address at its port hears nothing.
    let without = guest.home.contains("port address: \"00:00:00:00:00:00\"");
    let next = if without { wanted() } else { Wanted::default() };
    for (round, wanted) in [wanted(), next.clone(), next].into_iter().enumerate() {
        let mut held = Vec::new();
        for (n, (pod, vf)) in pods.iter().zip(vfs).enumerate() {
            let mut wanted = wanted.clone();
            wanted.port.mac = wanted.port.mac.map(|_| mac(0xa0 + n as u8));
            let mut lease = leases.prepare(&owner("a"), vf, &wanted).unwrap();
            lease.move_to(pod.path(), &"net1".parse().unwrap()).unwrap();
            held.push((vf, lease.commit().unwrap()));
            pod.sh(&format!("ip addr add 10.9.0.{}/24 dev net1", n + 1));
        }
        let there = [10, 9, 0, 2].into();
        // Carrier comes some time after a device is set up.
        let answered = (0..60).any(|_| ping(&pods[0], there, Duration::from_secs(2)).is_ok());
        assert!(answered, "round {round}: {}{}", guest.port.told(vfs[0]), guest.port.told(vfs[1]));
        for (vf, incarnation) in held {
            let released = leases.release(&owner("a"), vf.address, incarnation).unwrap();
            assert!(matches!(released, Released::Clean), "{released:?}");
        }
        guest.assert_home("released");
    }
}

/// A process that is killed after each of its calls to the kernel, in turn.
#[test]
fn a_kill_after_any_call_is_recovered_from() {
    if !require(Rung::Vm) {
        return;
    }
    let guest = Guest::new();
    let pod = guest.host.new_pod();
    let (mut kills, mut unclean) = (0, 0);
    for call in (1..).step_by(effort(3, 1, 1)) {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "igb::the_life_of_a_pod", "--nocapture"])
            .env(LIFE, serde_json::to_string(&(call, guest.vf, guest.state.path(), pod.path())).unwrap())
            .output()
            .unwrap();
        if child.status.success() {
            break;
        }
        let said = String::from_utf8_lossy(&child.stderr);
        assert_eq!(child.status.signal(), Some(libc::SIGABRT), "call {call}: {}: {said}", child.status);
        kills += 1;
        unclean += u32::from(!guest.is_home());
        let outcome = guest.recover();
        assert!(matches!(outcome, Outcome::Free | Outcome::Restored | Outcome::Forgotten), "call {call}: {outcome:?}");
        guest.assert_home(&format!("killed after call {call}"));
        assert!(guest.leases().held().unwrap().is_empty());
    }
    eprintln!("{kills} kills, {unclean} unclean before recovery");
    assert!(kills > 10 && unclean * 3 > kills, "{kills} kills, {unclean} unclean");
}

/// What such a process does. Nothing of it is undone when it dies.
#[test]
#[ignore = "is run as a child process"]
fn the_life_of_a_pod() {
    let Ok(life) = std::env::var(LIFE) else { return };
    let (call, vf, state, pod): (u64, VfId, PathBuf, PathBuf) = serde_json::from_str(&life).unwrap();
    std::panic::set_hook(Box::new(|panic| {
        if panic.payload_as_str() == Some(FlakyKernel::DEATH) {
            std::process::abort();
        }
        eprintln!("{panic}");
    }));
    let linux = Arc::new(LinuxKernel::of_this_thread().unwrap());
    let leases = leases(Arc::new(FlakyKernel::new(linux.clone(), call, Fault::DieAfter)), &state);
    let incarnation = add(&leases, vf, &pod).unwrap();
    meddle(&linux, vf, &pod);
    assert!(matches!(leases.release(&owner("a"), vf.address, incarnation), Ok(Released::Clean)));
}

const LIFE: &str = "DCENET_TEST_LIFE";
