//! A modelled host with a function, and somebody who has it for a while.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, IfIndex, MacAddr};
use dcenet_sriov::kernel::{Kernel, Namespace, NetdevChange, VfChange, VfLinkState, VfRate, VfVlan};
use dcenet_sriov::lease::{LeaseError, Leases, Released, VfId, Wanted};
use dcenet_sriov::test_support::{FunctionState, Model, Profile};
use dcenet_sriov::{PciAddress, VfIndex};
use tempfile::TempDir;

pub(crate) const POD: &str = "/run/netns/a";

/// A host with one function that was dressed up by its administrator, or is as it was made.
pub(crate) struct World {
    pub(crate) model: Arc<Model>,
    pub(crate) port: IfIndex,
    pub(crate) profile: Profile,
    pub(crate) vf: VfId,
    pub(crate) state: TempDir,
    /// What the function is, as the model tells it.
    pub(crate) home: FunctionState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dress {
    Plain,
    Dressed,
}

impl World {
    pub(crate) fn new(profile: Profile, dress: Dress) -> Self {
        let (model, port) = Model::with_port(profile, 2);
        let address = model.function(port, 0);
        let vf = VfId { address, port: "0000:01:00.0".parse().unwrap(), index: VfIndex(0) };
        model.create_namespace(POD);
        if dress == Dress::Dressed {
            let vlan = VfVlan { id: Some(7.try_into().unwrap()), ..VfVlan::default() };
            let change = VfChange { mac: Some(mac(7)), vlan: Some(vlan), ..VfChange::default() };
            let device = model.netdevs(&Namespace::Host, address).unwrap()[0].index;
            let own = NetdevChange {
                mac: Some(mac(7)),
                mtu: Some(1480.try_into().unwrap()),
                alias: Some("spare".into()),
                ..NetdevChange::default()
            };
            if !profile.refuses_zero_mac {
                model.configure_netdev(&Namespace::Host, device, &own).unwrap();
            }
            model.configure_vf(port, VfIndex(0), &change).unwrap();
            model.add_alternative_name(&Namespace::Host, device, "slot3function0").unwrap();
        }
        let home = look(&model, address).unwrap();
        // Flushing costs nothing there.
        let memory = Path::new("/dev/shm");
        let state = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        Self { model: Arc::new(model), port, profile, vf, state: state.unwrap(), home }
    }

    pub(crate) fn leases(&self) -> Leases {
        self.leases_on(self.model.clone())
    }

    pub(crate) fn leases_on(&self, kernel: Arc<dyn Kernel>) -> Leases {
        let leases = Leases::open(kernel, self.state.path()).unwrap();
        leases.with_scrub(self.model.clone()).with_patience(Duration::from_millis(20))
    }

    /// The ledger's file of the function.
    pub(crate) fn file(&self) -> PathBuf {
        self.state.path().join("vfs").join(self.vf.address.to_string())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        fs::read(self.file()).unwrap_or_default()
    }

    pub(crate) fn now(&self) -> Option<FunctionState> {
        look(&self.model, self.vf.address)
    }

    pub(crate) fn is_home(&self) -> bool {
        self.now().as_ref() == Some(&self.home)
    }

    /// As much as the driver can do.
    pub(crate) fn wanted(&self) -> Wanted {
        let Profile { no_rate, no_link_state, has_trust, .. } = self.profile;
        Wanted {
            port: VfChange {
                mac: Some(mac(0xaa)),
                vlan: Some(VfVlan { id: Some(100.try_into().unwrap()), qos: 3, ..VfVlan::default() }),
                rate: (!no_rate).then_some(VfRate { min: 0, max: 500 }),
                spoofchk: Some(false),
                link_state: (!no_link_state).then_some(VfLinkState::Enable),
                trust: has_trust.then_some(true),
                ..VfChange::default()
            },
            mtu: Some(1400.try_into().unwrap()),
            all_multicast: Some(true),
            ..Wanted::default()
        }
    }

    /// What root in the pod can do to the device.
    pub(crate) fn meddle(&self) {
        let pod = Namespace::Path(POD.into());
        let Some(device) = self.model.netdevs(&pod, self.vf.address).unwrap().pop() else { return };
        let change = |change: NetdevChange| self.model.configure_netdev(&pod, device.index, &change).unwrap();
        change(NetdevChange { up: Some(false), ..NetdevChange::default() });
        change(NetdevChange {
            name: Some("mine".parse().unwrap()),
            alias: Some("tenant's".into()),
            mtu: Some(1300.try_into().unwrap()),
            promisc: Some(true),
            up: Some(true),
            ..NetdevChange::default()
        });
        self.model.add_alternative_name(&pod, device.index, "also-mine").unwrap();
        self.model.attach_program(self.vf.address, "spy");
    }

    /// As [`wanted`](Self::wanted), for a program of the pod.
    pub(crate) fn wanted_by_program(&self) -> Wanted {
        Wanted { port: self.wanted().port, driver: Some("vfio-pci".to_owned()), ..Wanted::default() }
    }

    /// The life of a pod whose program drives the function.
    pub(crate) fn live_by_program(&self, leases: &Leases) -> Result<Released, LeaseError> {
        let incarnation = leases.prepare(&owner("a"), self.vf, &self.wanted_by_program())?.commit()?;
        leases.release(&owner("a"), self.vf.address, incarnation)
    }

    /// The life of a pod: ADD, root at work, DEL.
    pub(crate) fn live(&self, leases: &Leases) -> Result<Released, LeaseError> {
        let mut lease = leases.prepare(&owner("a"), self.vf, &self.wanted())?;
        lease.move_to(Path::new(POD), &"net1".parse().unwrap())?;
        let incarnation = lease.commit()?;
        self.meddle();
        leases.release(&owner("a"), self.vf.address, incarnation)
    }
}

/// All of a function but the index of its device, which is another after each return.
pub(crate) fn look(model: &Model, function: PciAddress) -> Option<FunctionState> {
    let mut state = model.look(function)?;
    if let Some((_, device)) = &mut state.netdev {
        device.index = IfIndex::new(1).unwrap();
    }
    Some(state)
}

pub(crate) fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

pub(crate) fn owner(container: &str) -> AttachmentKey {
    AttachmentKey {
        network: "fast".parse().unwrap(),
        container: container.parse().unwrap(),
        ifname: "net1".parse().unwrap(),
    }
}
