//! Functions that a program of their owner drives, such as one built with DPDK.
//!
//! The program reaches no more than the function's IOMMU group can: a group with other functions in it is refused, and
//! so is a function without one. The driver that the function had is of its snapshot, so that it comes back as all else
//! does, after a kill at any step too; while the program has the group open the function is not taken from it, and stays
//! in quarantine until a recovery finds the group closed.

use super::{LeaseError, Leases, VfId};
use crate::inventory::is_vfio;
use crate::kernel::IommuGroup;

impl Leases {
    /// The group of a function that this driver is to hand to a program.
    pub(super) fn group_for(&self, vf: VfId, driver: &str) -> Result<IommuGroup, LeaseError> {
        if !is_vfio(driver) {
            return Err(LeaseError::NotVfio { vf: vf.address, driver: driver.to_owned() });
        }
        let group = self.kernel.iommu_group(vf.address)?.ok_or(LeaseError::NoIommuGroup { vf: vf.address })?;
        let others: Vec<_> = group.functions.iter().copied().filter(|other| *other != vf.address).collect();
        if others.is_empty() {
            Ok(group)
        } else {
            Err(LeaseError::SharedGroup { vf: vf.address, group: group.number, others })
        }
    }
}
