//! A function on its way to somebody.

use std::path::Path;

use dcenet_core::model::{IfIndex, IfName};

use super::record::{Away, Step, VfPage};
use super::straight::Seen;
use super::{Difference, LeaseError, Leases, Released, VfId, Wanted};
use crate::kernel::{ErrorClass, IommuGroup, KernelError, Namespace, NetdevChange, NetdevState};

/// A function that is being given to somebody. Dropped without [`commit`](Self::commit), it is taken back: the drop
/// asks the kernel, flushes a file, and blocks its thread as long as the patience of the [`Leases`] at most for each
/// wait.
#[derive(Debug)]
#[must_use = "dropped, it is taken back"]
pub struct VfLease<'l> {
    leases: &'l Leases,
    page: Option<VfPage>,
    vf: VfId,
    incarnation: u64,
    wanted: Wanted,
    link: Option<(IfName, IfIndex)>,
    group: Option<IommuGroup>,
}

impl<'l> VfLease<'l> {
    pub(super) fn new(leases: &'l Leases, page: VfPage, vf: VfId, incarnation: u64, wanted: Wanted) -> Self {
        Self { leases, page: Some(page), vf, incarnation, wanted, link: None, group: None }
    }

    /// It was seen as it is wanted.
    pub(super) fn prepared(&mut self, seen: &Seen, group: Option<IommuGroup>) {
        self.group = group;
        let Seen { now, port: _, device } = seen;
        self.link = now.netdev.as_ref().map(|netdev| netdev.name.clone()).zip(*device);
    }

    /// Name and index in the host's namespace of its network device, as it was prepared; `None` where its driver makes
    /// none.
    pub fn link(&self) -> Option<&(IfName, IfIndex)> {
        self.link.as_ref()
    }

    /// The group whose [files](IommuGroup::files) a program of the owner opens; `None` where the lease is for none.
    pub fn iommu_group(&self) -> Option<&IommuGroup> {
        self.group.as_ref()
    }

    /// The function.
    pub fn vf(&self) -> VfId {
        self.vf
    }

    /// The number of this lease, which [`Leases::release`] must name.
    pub fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Its network device in the host's namespace; `None` where its driver makes none.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn netdev(&self) -> Result<Option<NetdevState>, LeaseError> {
        let devices = self.leases.kernel.netdevs(&Namespace::Host, self.vf.address)?;
        Ok(devices.into_iter().min_by_key(|device| device.index))
    }

    /// Moves its network device into a namespace under a name, and sets it up there, in one request. That it goes there
    /// is written down before.
    ///
    /// # Errors
    /// The device is where it was or there; dropping the lease brings it home.
    pub fn move_to(&mut self, path: &Path, name: &IfName) -> Result<NetdevState, LeaseError> {
        let kernel = &*self.leases.kernel;
        let there = Namespace::Path(path.to_owned());
        let hidden = || LeaseError::Hidden { vf: self.vf.address };
        let device = self.netdev()?.ok_or_else(hidden)?;
        self.moving_to(path)?;
        let up = NetdevChange { up: Some(true), ..NetdevChange::default() };
        kernel.move_netdev(&Namespace::Host, device.index, &there, name, &up)?;
        let hidden = || LeaseError::Hidden { vf: self.vf.address };
        let moved = kernel.netdevs(&there, self.vf.address)?.into_iter().min_by_key(|device| device.index);
        let moved = moved.ok_or_else(hidden)?;
        let differs = |what, want: String, is: String| (want != is).then_some(Difference { what, want, is });
        let mac = self.wanted.mac().or(device.mac);
        let differences: Vec<_> = [
            differs("name", name.to_string(), moved.name.to_string()),
            differs("effectiveMac", format!("{mac:?}"), format!("{:?}", moved.mac)),
            differs("mtu", device.mtu.to_string(), moved.mtu.to_string()),
            differs("up", true.to_string(), moved.up.to_string()),
        ]
        .into_iter()
        .flatten()
        .collect();
        if differences.is_empty() {
            Ok(moved)
        } else {
            Err(LeaseError::Unverified { vf: self.vf.address, differences })
        }
    }

    /// Writes down that somebody else moves its network device into a namespace next.
    ///
    /// # Errors
    /// Where the namespace is gone, or the ledger cannot be written.
    pub fn moving_to(&mut self, path: &Path) -> Result<(), LeaseError> {
        let there = Namespace::Path(path.to_owned());
        let Some(netns) = self.leases.kernel.namespace_id(&there)? else {
            return Err(KernelError::of_class(format!("look at {there}"), ErrorClass::NamespaceGone).into());
        };
        let away = Away { path: path.to_owned(), netns };
        if let Some(page) = &mut self.page {
            page.step(&Step::Moving(away))?;
        }
        Ok(())
    }

    /// The owner has it from now on. Returns the number of the lease.
    ///
    /// # Errors
    /// Where the ledger cannot be written: it is taken back.
    pub fn commit(mut self) -> Result<u64, LeaseError> {
        if let Some(page) = &mut self.page {
            page.step(&Step::Committed)?;
        }
        self.page = None;
        Ok(self.incarnation)
    }

    /// Takes it back because of these errors.
    pub(super) fn refuse(&mut self, errors: Vec<LeaseError>) -> LeaseError {
        let rollback = match self.take_back() {
            Ok(Released::Quarantined(rollback)) => rollback,
            Ok(Released::Clean | Released::Gone | Released::NotHeld) => Vec::new(),
            Err(error) => vec![error],
        };
        LeaseError::Refused { errors, rollback }
    }

    fn take_back(&mut self) -> Result<Released, LeaseError> {
        let Some(mut page) = self.page.take() else { return Ok(Released::NotHeld) };
        let Some(open) = page.account()?.open.clone() else { return Ok(Released::NotHeld) };
        self.leases.take_back(&mut page, self.vf, &open)
    }
}

impl Drop for VfLease<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Nobody knows what state the caller is in. The record is open, and the next call begins with taking it
            // back.
            return;
        }
        match self.take_back() {
            Ok(Released::Clean | Released::Gone | Released::NotHeld) => {}
            // It was logged where it was put into quarantine.
            Ok(Released::Quarantined(_)) => {}
            Err(error) => tracing::error!(vf = %self.vf.address, %error, "a function waits for its recovery"),
        }
    }
}
