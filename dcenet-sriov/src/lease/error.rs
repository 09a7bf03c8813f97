//! Why a function cannot be had, or not be given back.

use std::path::PathBuf;

use dcenet_core::journal::LedgerError;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::ScrubError;

use super::snapshot::Difference;
use crate::address::PciAddress;
use crate::config::Unsupported;
use crate::kernel::KernelError;

/// Why something could not be done with a function.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Somebody has it.
    #[error("{vf}: {}/{} has it for {} (incarnation {incarnation}); choose another, or release it", owner.network, owner.container, owner.ifname)]
    Taken {
        /// The function.
        vf: PciAddress,
        /// Who has it.
        owner: Box<AttachmentKey>,
        /// The number of the lease.
        incarnation: u64,
    },
    /// Nobody gets it.
    #[error("{vf} is in quarantine: {reason}; choose another, and recover or readmit it")]
    Quarantined {
        /// The function.
        vf: PciAddress,
        /// Why.
        reason: String,
    },
    /// Somebody has it, or it is in quarantine, in the ledger of another state directory.
    #[error("{vf}: the ledger of state directory {} has it; give one stateDir to all networks of the node", state.display())]
    Elsewhere {
        /// The function.
        vf: PciAddress,
        /// That state directory.
        state: PathBuf,
    },
    /// The machine has no such function (any more).
    #[error("{vf}: the function is gone; its port's VF count was changed")]
    Gone {
        /// The function.
        vf: PciAddress,
    },
    /// The port's network device is not in the host's namespace, so that its settings can be neither read nor written.
    #[error(
        "{vf}: no network device of its port {port} in the host's namespace tells of it; bring the port back there"
    )]
    NoPort {
        /// The function.
        vf: PciAddress,
        /// The port.
        port: PciAddress,
    },
    /// Its network device is in none of the namespaces in which it could be.
    #[error(
        "{vf}: its network device is in no namespace that can be looked into; it comes back when the last process that uses its namespace ends"
    )]
    Hidden {
        /// The function.
        vf: PciAddress,
    },
    /// It has a driver, and no network device in any namespace.
    #[error(
        "{vf}: its driver has made no network device; see the kernel's log, and whether its port is up, then unbind and bind it"
    )]
    NoDevice {
        /// The function.
        vf: PciAddress,
    },
    /// The function at this address is not the one that was named.
    #[error("{vf}: it is not VF {index} of port {port}; take the inventory anew")]
    Another {
        /// The address.
        vf: PciAddress,
        /// The port that was named.
        port: PciAddress,
        /// The number that was named.
        index: crate::address::VfIndex,
    },
    /// The driver of its port cannot set what is wanted, or does not tell of it. Nothing was changed.
    #[error("{vf}: {source}")]
    Unsupported {
        /// The function.
        vf: PciAddress,
        /// What cannot be set.
        source: Unsupported,
    },
    /// The driver is none of VFIO. Nothing was changed.
    #[error("{vf}: driver {driver} hands no function to a program safely; name vfio-pci, or a variant of it")]
    NotVfio {
        /// The function.
        vf: PciAddress,
        /// The driver that was wanted.
        driver: String,
    },
    /// A program that drives it could reach all of the memory. Nothing was changed.
    #[error(
        "{vf}: it has no IOMMU group, so that a program which drives it could reach all memory; turn the IOMMU on (in the firmware, and by the kernel's intel_iommu=on or amd_iommu=on)"
    )]
    NoIommuGroup {
        /// The function.
        vf: PciAddress,
    },
    /// A program that drives it could reach the others. Nothing was changed.
    #[error(
        "{vf}: it shares IOMMU group {group} with {}; use a slot or an adapter that keeps functions apart (PCIe ACS)",
        addresses(others)
    )]
    SharedGroup {
        /// The function.
        vf: PciAddress,
        /// The number of the group.
        group: u32,
        /// What else is in it.
        others: Vec<PciAddress>,
    },
    /// It is not what it should be, though nothing was refused.
    #[error("{vf}: {}; somebody else may configure it, or its driver cannot", list(differences))]
    Unverified {
        /// The function.
        vf: PciAddress,
        /// What is wrong.
        differences: Vec<Difference>,
    },
    /// What was wanted was refused, and what had been changed was taken back, but for what `rollback` tells.
    #[error("{}{}", all(errors), rolled_back(rollback))]
    Refused {
        /// Why.
        errors: Vec<LeaseError>,
        /// What could not be taken back: then the function is in quarantine.
        rollback: Vec<LeaseError>,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Foreign programs may be on its device.
    #[error(transparent)]
    Scrub(#[from] ScrubError),
    /// The ledger refused.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

fn addresses(all: &[PciAddress]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Several errors as one line.
pub(super) fn all(errors: &[LeaseError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; and: ")
}

fn rolled_back(rollback: &[LeaseError]) -> String {
    if rollback.is_empty() { String::new() } else { format!("; and it could not be taken back: {}", all(rollback)) }
}
