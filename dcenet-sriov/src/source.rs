//! Virtual functions as devices that core's engine asks for: a link of the kind `sriov`.
//!
//! ```json
//! { "link":  { "kind": "sriov", "pool": "fast", "vf": { "vlan": 100 } },
//!   "sriov": { "pools": [ { "name": "fast", "select": [ { "pfs": ["ens1#0-3"] } ] } ] } }
//! ```
//!
//! Of the functions that are free somebody gets the one with the lowest address. Who has which, the ledger of
//! [`Leases`] knows, and nobody else: two calls at a time never get one function, in however many
//! processes. A lease is committed before the engine learns of the function, with the namespace into which that moves
//! it: whatever dies afterwards, [`release`](DeviceSource::release) finds it there or at home.
//!
//! Bed: igb, by the CNI plugin; modelled.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dcenet_core::journal::LedgerError;
use dcenet_core::model::{AttachmentKey, MacAddr, NetworkName};
use dcenet_core::netlink::Family;
use dcenet_core::netns::NetNs;
use dcenet_core::provider::{DeviceError, DeviceRequest, DeviceScrub, DeviceSource, DeviceWish, LentDevice};
use dcenet_core::section;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::address::PciAddress;
use crate::allocate::Request;
use crate::config::{VfConfig, VfSettings};
use crate::inventory::{Inventory, VfDriverKind};
use crate::kernel::{LinuxKernel, VfLinkState, VfRate, VfState, VfVlan};
use crate::lease::{ChooseError, Chosen, LeaseError, Leases, Restore, Wanted};
use crate::pool::{HostUse, Pools};
use crate::sysfs::{Sysfs, SysfsDir};

/// The section `sriov`, as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct SourceConfig {
    /// The pools, as [`Pools`] reads them.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub pools: Value,
    /// A file that holds such a list, in place of `pools`: one for all networks of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pools_file: Option<PathBuf>,
    /// What functions are made when they come back.
    pub restore: Restore,
}

impl SourceConfig {
    /// Reads the section.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`], with the path of the field from `sriov` on.
    ///
    /// Bed: pure.
    pub fn read(section: &Value) -> Result<Self, DeviceError> {
        section::read(SECTION, section).map_err(invalid_section)
    }

    /// The pools, of the section or of the file that it names, as that is now.
    ///
    /// # Errors
    /// [`DeviceError::Invalid`] where there are none, or they are wrong.
    ///
    /// Bed: pure.
    pub fn pools(&self) -> Result<Pools, DeviceError> {
        let Self { pools, pools_file, .. } = self;
        let invalid =
            |field: &str, reason: String| DeviceError::Invalid { field: format!("{SECTION}.{field}"), reason };
        match pools_file {
            Some(_) if !pools.is_null() => {
                Err(invalid("poolsFile", "pools are given too; keep one of both".to_owned()))
            }
            Some(path) => {
                let text = std::fs::read(path)
                    .map_err(|error| invalid("poolsFile", format!("{}: {error}", path.display())))?;
                let value = serde_json::from_slice(&text)
                    .map_err(|error| invalid("poolsFile", format!("{} is not JSON: {error}", path.display())))?;
                Pools::read(&path.display().to_string(), &value).map_err(invalid_section)
            }
            None if pools.is_null() => Err(invalid("pools", "missing; give a list of pools, or poolsFile".to_owned())),
            None => Pools::read(&format!("{SECTION}.pools"), pools).map_err(invalid_section),
        }
    }
}

/// Hands out the virtual functions of a machine.
pub struct VfSource {
    open: Box<dyn Fn() -> Result<Machine, DeviceError> + Send + Sync>,
    machine: OnceLock<Machine>,
    /// Where the ledger is, once there is one.
    ledger: PathBuf,
    /// Read when it is needed: what is wrong with it keeps nobody from giving a function back.
    section: Option<Value>,
}

/// What functions are found by, and who has them.
pub struct Machine {
    /// Who has which.
    pub leases: Leases,
    /// Where they are found.
    pub sysfs: Arc<dyn Sysfs + Send + Sync>,
    /// What the host uses itself.
    pub host: Box<dyn Fn() -> Result<HostUse, DeviceError> + Send + Sync>,
}

impl Machine {
    /// This machine, as it is seen in the network namespace of the calling thread, with the leases of a state directory.
    /// `scrub` takes foreign programs off devices.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] where the namespace or the boot's id cannot be read.
    ///
    /// Bed: igb, by the CNI plugin.
    pub fn of_this_thread(state: &Path, scrub: Option<Arc<dyn DeviceScrub>>) -> Result<Self, DeviceError> {
        let netns = NetNs::of_this_thread().map_err(failed)?;
        let kernel = Arc::new(LinuxKernel::of_this_thread().map_err(failed)?);
        let leases = Leases::open(kernel, state).map_err(failed)?;
        let leases = leases.with_claims(Path::new(CLAIMS)).map_err(failed)?;
        Ok(Self {
            leases: match scrub {
                Some(scrub) => leases.with_scrub(scrub),
                None => leases,
            },
            sysfs: Arc::new(SysfsDir::system()),
            host: Box::new(move || {
                let mut socket = netns.socket(Family::Route).map_err(failed)?;
                HostUse::read(&mut socket).map_err(failed)
            }),
        })
    }
}

impl VfSource {
    /// The functions of this machine, which are seen in the network namespace of the thread that first asks. `section`
    /// is the section `sriov` of a configuration, `scrub` takes foreign programs off devices.
    ///
    /// Nothing is opened before it is needed.
    pub fn of_this_machine(state: &Path, section: Option<Value>, scrub: Option<Arc<dyn DeviceScrub>>) -> Self {
        let directory = state.to_owned();
        let open = move || Machine::of_this_thread(&directory, scrub.clone());
        Self::new(state, section, Box::new(open))
    }

    /// Functions of any machine, whose leases are kept in the same state directory.
    pub fn new(
        state: &Path,
        section: Option<Value>,
        open: Box<dyn Fn() -> Result<Machine, DeviceError> + Send + Sync>,
    ) -> Self {
        Self { open, machine: OnceLock::new(), ledger: state.join(crate::lease::LEDGER), section }
    }

    fn machine(&self) -> Result<&Machine, DeviceError> {
        match self.machine.get() {
            Some(machine) => Ok(machine),
            None => {
                let opened = (self.open)()?;
                Ok(self.machine.get_or_init(|| opened))
            }
        }
    }

    /// The machine, where anything was ever lent on it.
    fn machine_with_ledger(&self) -> Result<Option<&Machine>, DeviceError> {
        match self.ledger.try_exists() {
            Ok(false) => Ok(None),
            Ok(true) => self.machine().map(Some),
            Err(error) => Err(failed(error)),
        }
    }

    fn config(&self) -> Result<SourceConfig, DeviceError> {
        self.section.as_ref().map_or_else(|| Ok(SourceConfig::default()), SourceConfig::read)
    }

    /// The functions that may serve a wish.
    fn candidates(
        &self,
        machine: &Machine,
        wish: &DeviceWish,
        all: &Inventory,
    ) -> Result<Vec<PciAddress>, DeviceError> {
        let host = (machine.host)()?;
        let device = wish.device.as_deref().map(|text| named(text, all, &host)).transpose()?;
        let Some(pool) = &wish.pool else { return Ok(device.into_iter().collect()) };
        let pools = self.config()?.pools()?;
        let members = pools
            .resolve(all, &host)
            .map_err(|error| DeviceError::Invalid { field: format!("{SECTION}.pools"), reason: error.to_string() })?;
        let Some(members) = members.into_iter().find(|members| members.pool == *pool) else {
            let known: Vec<&str> = pools.configs().iter().map(|pool| pool.name.as_str()).collect();
            let hint = section::suggestion(pool, known.iter().copied());
            let hint = hint.map(|name| format!("; did you mean {name:?}?")).unwrap_or_default();
            return Err(DeviceError::Invalid {
                field: "link.pool".to_owned(),
                reason: format!("{pool:?} is none of the section {SECTION}'s pools, which are {known:?}{hint}"),
            });
        };
        match device {
            Some(device) if members.functions.contains(&device) => Ok(vec![device]),
            Some(device) => Err(DeviceError::Invalid {
                field: "link.device".to_owned(),
                reason: format!("{device} is not of pool {pool:?}; name another, or leave link.pool out"),
            }),
            None if members.functions.is_empty() && !members.refused.is_empty() => {
                let refused: Vec<String> = members.refused.iter().map(ToString::to_string).collect();
                Err(DeviceError::Invalid {
                    field: "link.pool".to_owned(),
                    reason: format!("{pool:?} has no function that may be handed out: {}", refused.join("; ")),
                })
            }
            // What a program of user space drives, or nothing, may be a virtual machine's: it is not touched to find
            // out.
            None => {
                let (links, others): (Vec<_>, Vec<_>) = members
                    .functions
                    .into_iter()
                    .partition(|vf| all.vf(*vf).is_some_and(|(_, vf)| matches!(vf.driver, VfDriverKind::Kernel(_))));
                match others.first() {
                    Some(first) if links.is_empty() => Err(DeviceError::Invalid {
                        field: "link.pool".to_owned(),
                        reason: format!("no function of {pool:?} has the kernel's driver, {first} for one; bind it"),
                    }),
                    _ => Ok(links),
                }
            }
        }
    }
}

impl DeviceSource for VfSource {
    fn lend(&self, request: &DeviceRequest) -> Result<LentDevice, DeviceError> {
        // Also of a call whose wish was another.
        self.release(&request.attachment)?;
        let wanted = wanted(&request.wish, request.mac)?;
        let machine = self.machine()?;
        let leases = machine.leases.clone().with_restore(self.config()?.restore);
        let inventory = Inventory::scan(&*machine.sysfs).map_err(failed)?;
        let members = self.candidates(machine, &request.wish, &inventory)?;
        let choose = || leases.choose(&request.attachment, &inventory, &members, &Request::of(1), &wanted);
        let chosen = match choose() {
            // What is in quarantine may be found by now.
            Err(ChooseError::TooFew { .. }) if leases.recover_quarantined(&members).map_err(of_lease)? => choose(),
            chosen => chosen,
        };
        let Chosen { leases: mut chosen, choice, .. } = chosen.map_err(of_choice)?;
        let Some(mut lease) = chosen.pop() else {
            return Err(failed("one function was wanted, and none was chosen"));
        };
        let why = choice.shares.first().map(ToString::to_string);
        tracing::debug!(attachment = %request.attachment, vf = %lease.vf().address, why, "a function was chosen");
        let id = lease.vf().address.to_string();
        let Some((name, index)) = lease.link().cloned() else {
            return Err(DeviceError::Invalid {
                field: "link.kind".to_owned(),
                reason: format!(
                    "the driver of {id} makes no network device, which a link needs; bind the kernel's driver, or keep such \
                     functions out of the pool by `drivers`"
                ),
            });
        };
        lease.moving_to(&request.netns).map_err(of_lease)?;
        lease.commit().map_err(of_lease)?;
        Ok(LentDevice { id, name, index, mac: request.mac })
    }

    fn is_lent(&self, attachment: &AttachmentKey) -> Result<bool, DeviceError> {
        let Some(machine) = self.machine_with_ledger()? else { return Ok(false) };
        Ok(!machine.leases.had_by(attachment).map_err(of_lease)?.is_empty())
    }

    fn missing(&self, attachment: &AttachmentKey, device: &LentDevice) -> Result<Vec<String>, DeviceError> {
        let vf: PciAddress = device.id.parse().map_err(failed)?;
        let drift = match self.machine_with_ledger()? {
            Some(machine) => machine.leases.drift(attachment, vf).map_err(of_lease)?,
            None => None,
        };
        Ok(match drift {
            Some(differences) => differences.iter().map(ToString::to_string).collect(),
            None => vec!["it is not lent to the pod any more".to_owned()],
        })
    }

    fn release(&self, attachment: &AttachmentKey) -> Result<(), DeviceError> {
        let Some(machine) = self.machine_with_ledger()? else { return Ok(()) };
        let leases = &machine.leases;
        let had = leases.had_by(attachment).map_err(of_lease)?;
        if had.is_empty() {
            return Ok(());
        }
        for held in &had.held {
            // Whoever gets nothing of a function that is not as it was has been told by the log.
            let released = patiently(|| leases.release(attachment, held.vf, held.incarnation)).map_err(of_lease)?;
            tracing::debug!(%attachment, vf = %held.vf, ?released, "a function was taken back");
        }
        // One that was just found nowhere was waited for, and may be there by now all the same.
        let lost = leases.had_by(attachment).map_err(of_lease)?.lost;
        leases.recover_quarantined(&lost).map_err(of_lease)?;
        match leases.had_by(attachment).map_err(of_lease)?.lost.first() {
            Some(vf) => Err(DeviceError::Busy(Box::new(LeaseError::Hidden { vf: *vf }))),
            None => Ok(()),
        }
    }

    fn lent(&self, network: &NetworkName) -> Result<Vec<AttachmentKey>, DeviceError> {
        let Some(machine) = self.machine_with_ledger()? else { return Ok(Vec::new()) };
        let owners = machine.leases.owners().map_err(of_lease)?;
        Ok(owners.into_iter().filter(|owner| owner.network == *network).collect())
    }

    fn ready(&self, wish: Option<&DeviceWish>) -> Result<(), DeviceError> {
        let config = self.config()?;
        if !config.pools.is_null() || config.pools_file.is_some() {
            config.pools()?;
        }
        let machine = self.machine()?;
        if let Some(wish) = wish {
            // Whose it will be changes nothing about what can be set.
            wanted(wish, MacAddr::new([2, 0, 0, 0, 0, 0]))?;
            let inventory = Inventory::scan(&*machine.sysfs).map_err(failed)?;
            self.candidates(machine, wish, &inventory)?;
        }
        machine.leases.held().map(drop).map_err(of_lease)
    }
}

impl std::fmt::Debug for VfSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { open: _, machine, ledger, section } = self;
        f.debug_struct("VfSource")
            .field("opened", &machine.get().is_some())
            .field("ledger", ledger)
            .field("section", section)
            .finish_non_exhaustive()
    }
}

/// What a function is to be for a pod.
fn wanted(wish: &DeviceWish, mac: MacAddr) -> Result<Wanted, DeviceError> {
    let invalid = |field: &str, reason: String| DeviceError::Invalid { field: format!("link.{field}"), reason };
    let settings: VfSettings = read(&wish.settings)?;
    let elsewhere = [
        ("vf.mac", settings.mac.map(|mac| mac.to_string()), "every pod has its own; ask for one by the capability mac"),
        ("vf.mtu", settings.mtu.map(|mtu| mtu.to_string()), "say link.mtu"),
    ];
    if let Some((field, value, remedy)) = elsewhere.into_iter().find_map(|(f, value, remedy)| Some((f, value?, remedy)))
    {
        return Err(invalid(field, format!("{value} has another place: {remedy}")));
    }
    let vlan = match (settings.vlan, wish.vlan) {
        (Some(vlan), Some(of_pool)) if vlan != of_pool.get() => {
            let reason =
                format!("{vlan}, and the pod's addresses are of a pool in VLAN {}; keep one of both", of_pool.get());
            return Err(invalid("vf.vlan", reason));
        }
        (vlan, of_pool) => vlan.or(of_pool.map(|vlan| vlan.get())),
    };
    let config = VfConfig::new(VfSettings { vlan, mac: Some(mac), mtu: wish.mtu, ..settings })
        .map_err(|error| invalid("vf", error.to_string()))?;
    let port = config.change(&nothing()).map_err(|error| invalid("vf", error.to_string()))?;
    let VfSettings { all_multicast, promisc, .. } = *config.settings();
    Ok(Wanted { port, mac: None, mtu: wish.mtu, promisc, all_multicast, driver: None })
}

fn read(settings: &Map<String, Value>) -> Result<VfSettings, DeviceError> {
    section::read("link.vf", &Value::Object(settings.clone())).map_err(invalid_section)
}

/// A function without rates: of two that go in one message, the one that is not asked for is none.
fn nothing() -> VfState {
    VfState {
        mac: MacAddr::new([0; 6]),
        vlan: VfVlan::default(),
        rate: VfRate { min: 0, max: 0 },
        spoofchk: None,
        trust: None,
        link_state: VfLinkState::Auto,
        rss_query: None,
        guids: None,
    }
}

/// The function of that address, unless the host uses its device itself.
fn named(text: &str, all: &Inventory, host: &HostUse) -> Result<PciAddress, DeviceError> {
    let invalid = |reason: String| DeviceError::Invalid { field: "link.device".to_owned(), reason };
    let address: PciAddress = text.parse().map_err(|error| invalid(format!("{error}")))?;
    let Some((_, vf)) = all.vf(address) else {
        return Err(invalid(format!(
            "this machine has no virtual function {address}; `lspci -D` tells which there are"
        )));
    };
    match vf.netdevs.iter().find_map(|name| Some((name, host.by(name)?))) {
        Some((name, used)) => Err(invalid(format!("{address}: {name} {used}; name another"))),
        None => Ok(address),
    }
}

/// Somebody who looks at all functions, as a recovery does, has each to itself for a moment.
fn patiently<T>(mut call: impl FnMut() -> Result<T, LeaseError>) -> Result<T, LeaseError> {
    let begun = Instant::now();
    loop {
        match call() {
            Err(LeaseError::Ledger(LedgerError::Busy { .. })) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome,
        }
    }
}

fn of_choice(error: ChooseError) -> DeviceError {
    match error {
        ChooseError::TooFew { .. } => DeviceError::Unavailable(Box::new(error)),
        ChooseError::Lease(error) => of_lease(error),
    }
}

fn of_lease(error: LeaseError) -> DeviceError {
    match error {
        error if passes(&error) => DeviceError::Busy(Box::new(error)),
        LeaseError::Unsupported { .. } => {
            DeviceError::Invalid { field: "link.vf".to_owned(), reason: error.to_string() }
        }
        error => failed(error),
    }
}

/// Whether the same may be had later: somebody works on the function, or its driver is busy.
fn passes(error: &LeaseError) -> bool {
    match error {
        LeaseError::Ledger(LedgerError::Busy { .. }) => true,
        LeaseError::Kernel(error) => error.is_retryable(),
        LeaseError::Refused { errors, rollback } => rollback.is_empty() && errors.iter().any(passes),
        _ => false,
    }
}

fn invalid_section(error: section::SectionError) -> DeviceError {
    DeviceError::Invalid { field: error.field, reason: error.reason }
}

fn failed(error: impl Into<Box<dyn Error + Send + Sync>>) -> DeviceError {
    DeviceError::Failed(error.into())
}

/// How long a function is waited for that somebody looks at.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where it is written down in which state directory a function's lease is.
const CLAIMS: &str = "/run/dcenet";
/// Its name in a configuration.
const SECTION: &str = "sriov";
