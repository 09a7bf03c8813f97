//! A kernel of which one call fails, or whose caller dies there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dcenet_core::model::{IfIndex, IfName};
use dcenet_core::netns::NetNsId;

use crate::address::{PciAddress, VfIndex};
use crate::kernel::{
    DriverState, ErrorClass, IommuGroup, Kernel, KernelError, LinkCounters, Namespace, NetdevChange, NetdevState,
    VfChange, VfCount, VfState, Watch,
};

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not made, and is refused with this errno.
    Fail(i32),
    /// It is made, and its outcome is lost.
    Lose,
    /// The caller dies before it.
    Die,
    /// The caller dies after it took effect.
    DieAfter,
}

/// A kernel that counts its calls from 1, and has the n-th meet a fault.
///
/// Death is a panic with the text [`FlakyKernel::DEATH`], to be caught by the test. What the caller's destructors still
/// ask is refused, and reaches the kernel no more.
#[derive(Debug)]
pub struct FlakyKernel {
    inner: Arc<dyn Kernel>,
    call: u64,
    fault: Fault,
    count: AtomicU64,
    dead: AtomicBool,
}

impl FlakyKernel {
    /// What a death says.
    pub const DEATH: &str = "dies, as the test wants";

    /// The kernel, whose call of this number meets the fault; none does with 0.
    pub fn new(inner: Arc<dyn Kernel>, call: u64, fault: Fault) -> Self {
        Self { inner, call, fault, count: AtomicU64::new(0), dead: AtomicBool::new(false) }
    }

    /// How many calls were made.
    pub fn calls(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether the caller died.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    fn pass<T>(&self, operation: &str, call: impl FnOnce() -> Result<T, KernelError>) -> Result<T, KernelError> {
        if self.is_dead() {
            return Err(KernelError::of_class(operation, ErrorClass::Other).saying("the caller is dead"));
        }
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 != self.call {
            return call();
        }
        let die = || {
            self.dead.store(true, Ordering::SeqCst);
            panic!("{}", Self::DEATH)
        };
        match self.fault {
            Fault::Fail(errno) => Err(KernelError::refused(operation, errno).saying("injected")),
            Fault::Lose => call().and_then(|_| Err(KernelError::of_class(operation, ErrorClass::Lost))),
            Fault::Die => die(),
            Fault::DieAfter => {
                // Whatever came of it: nobody is left to tell.
                drop(call());
                die()
            }
        }
    }
}

impl Kernel for FlakyKernel {
    fn vfs(&self, port: IfIndex) -> Result<Vec<(VfIndex, VfState)>, KernelError> {
        self.pass("list VFs", || self.inner.vfs(port))
    }

    fn vf(&self, port: IfIndex, vf: VfIndex) -> Result<VfState, KernelError> {
        self.pass("look up VF", || self.inner.vf(port, vf))
    }

    fn vf_counters(&self, port: IfIndex) -> Result<Vec<(VfIndex, LinkCounters)>, KernelError> {
        self.pass("read counters of VFs", || self.inner.vf_counters(port))
    }

    fn netdev_counters(&self, at: &Namespace, function: PciAddress) -> Result<Option<LinkCounters>, KernelError> {
        self.pass("read counters of devices", || self.inner.netdev_counters(at, function))
    }

    fn configure_vf(&self, port: IfIndex, vf: VfIndex, change: &VfChange) -> Result<(), KernelError> {
        self.pass("configure VF", || self.inner.configure_vf(port, vf, change))
    }

    fn netdevs(&self, at: &Namespace, function: PciAddress) -> Result<Vec<NetdevState>, KernelError> {
        self.pass("look for devices", || self.inner.netdevs(at, function))
    }

    fn has_netdev(&self, function: PciAddress) -> Result<bool, KernelError> {
        self.pass("look for any device", || self.inner.has_netdev(function))
    }

    fn netdev(&self, at: &Namespace, index: IfIndex) -> Result<Option<NetdevState>, KernelError> {
        self.pass("look up link", || self.inner.netdev(at, index))
    }

    fn configure_netdev(&self, at: &Namespace, index: IfIndex, change: &NetdevChange) -> Result<(), KernelError> {
        self.pass("configure link", || self.inner.configure_netdev(at, index, change))
    }

    fn move_netdev(
        &self,
        from: &Namespace,
        index: IfIndex,
        to: &Namespace,
        name: &IfName,
        change: &NetdevChange,
    ) -> Result<(), KernelError> {
        self.pass("move link", || self.inner.move_netdev(from, index, to, name, change))
    }

    fn add_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        self.pass("add alternative name", || self.inner.add_alternative_name(at, index, name))
    }

    fn delete_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        self.pass("delete alternative name", || self.inner.delete_alternative_name(at, index, name))
    }

    fn namespace_id(&self, at: &Namespace) -> Result<Option<NetNsId>, KernelError> {
        self.pass("identify namespace", || self.inner.namespace_id(at))
    }

    fn driver(&self, function: PciAddress) -> Result<DriverState, KernelError> {
        self.pass("look up driver", || self.inner.driver(function))
    }

    fn bind(&self, function: PciAddress, driver: &str) -> Result<(), KernelError> {
        self.pass("bind", || self.inner.bind(function, driver))
    }

    fn unbind(&self, function: PciAddress) -> Result<(), KernelError> {
        self.pass("unbind", || self.inner.unbind(function))
    }

    fn set_driver_override(&self, function: PciAddress, driver: Option<&str>) -> Result<(), KernelError> {
        self.pass("set driver override", || self.inner.set_driver_override(function, driver))
    }

    fn iommu_group(&self, function: PciAddress) -> Result<Option<IommuGroup>, KernelError> {
        self.pass("look up IOMMU group", || self.inner.iommu_group(function))
    }

    fn vf_count(&self, port: PciAddress) -> Result<VfCount, KernelError> {
        self.pass("look up VF count", || self.inner.vf_count(port))
    }

    fn write_vf_count(&self, port: PciAddress, count: u16) -> Result<(), KernelError> {
        self.pass("set VF count", || self.inner.write_vf_count(port, count))
    }

    fn write_autoprobe(&self, port: PciAddress, autoprobe: bool) -> Result<(), KernelError> {
        self.pass("set autoprobe", || self.inner.write_autoprobe(port, autoprobe))
    }

    fn vf_addresses(&self, port: PciAddress) -> Result<Vec<(VfIndex, PciAddress)>, KernelError> {
        self.pass("list VFs", || self.inner.vf_addresses(port))
    }

    fn in_host(&self, work: &mut (dyn FnMut() + Send)) -> Result<(), KernelError> {
        self.pass("work in the host's namespace", || self.inner.in_host(work))
    }

    fn watch(&self) -> Result<Box<dyn Watch + '_>, KernelError> {
        self.pass("watch", || self.inner.watch())
    }
}
