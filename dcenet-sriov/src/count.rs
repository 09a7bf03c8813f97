//! How many virtual functions a port has.
//!
//! The kernel makes all or none: from one number to another it goes by way of 0, where every function vanishes from whoever
//! has it. Here nothing of that happens while a function is in use, and what was made is there when the call returns. Where
//! functions are leased, [`Leases::set_vf_count`](crate::lease::Leases::set_vf_count) keeps them from being so meanwhile.

use std::fmt;
use std::time::{Duration, Instant};

use dcenet_core::journal::LedgerError;

use crate::address::{PciAddress, VfIndex};
use crate::inventory::is_for_user_space;
use crate::kernel::{Kernel, KernelError, Namespace, VfCount, Watch};

/// A number of functions to be had.
pub struct CountRequest<'a> {
    /// How many.
    pub count: u16,
    /// Whether drivers are to be bound to them; `None` leaves it as it is.
    pub autoprobe: Option<bool>,
    /// Who uses a function, for people; `None` for nobody. It is asked of each before any is taken away.
    pub user: &'a dyn Fn(PciAddress) -> Option<String>,
    /// Takes functions away though their devices are in other namespaces, or drivers of user space have them. Never those
    /// that have a user.
    pub even_elsewhere: bool,
    /// How long to wait for functions and their devices.
    pub limit: Duration,
}

impl fmt::Debug for CountRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { count, autoprobe, user: _, even_elsewhere, limit } = self;
        f.debug_struct("CountRequest")
            .field("count", count)
            .field("autoprobe", autoprobe)
            .field("even_elsewhere", even_elsewhere)
            .field("limit", limit)
            .finish_non_exhaustive()
    }
}

/// Why a port has not as many functions as wanted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CountError {
    /// A function is in use: nothing was changed.
    #[error("VF count of {port}: {function} is used by {user}; release it first")]
    InUse {
        /// The port.
        port: PciAddress,
        /// The function.
        function: PciAddress,
        /// Who uses it.
        user: String,
    },
    /// More than the port can have (`ERANGE`): nothing was changed.
    #[error(
        "VF count {wanted} of {port}: it can have {total}; give at most that, or raise it in the adapter's firmware"
    )]
    TooMany {
        /// The port.
        port: PciAddress,
        /// How many were wanted.
        wanted: u16,
        /// How many it can have.
        total: u16,
    },
    /// The port has no driver, or one without functions (`ENOENT`).
    #[error("VF count of {port}: it has no driver that makes virtual functions; bind it to its driver{}", Left(*.left))]
    NoDriver {
        /// The port.
        port: PciAddress,
        /// How many it has now.
        left: u16,
    },
    /// Somebody else changed the number at the same time (`EBUSY`).
    #[error("VF count of {port}: somebody else changes it; let one program do so{}", Left(*.left))]
    Raced {
        /// The port.
        port: PciAddress,
        /// How many it has now.
        left: u16,
    },
    /// Interrupts, bus numbers or memory have run out (`ENOSPC`, `ENOMEM`).
    #[error("VF count {wanted} of {port}: {source}; ask for fewer{}", Left(*.left))]
    Exhausted {
        /// The port.
        port: PciAddress,
        /// How many were wanted.
        wanted: u16,
        /// How many it has now.
        left: u16,
        /// What the kernel said.
        #[source]
        source: KernelError,
    },
    /// The driver refused for another reason, such as `EINVAL` where its firmware has SR-IOV off.
    #[error("VF count {wanted} of {port}: {source}{}", Left(*.left))]
    Refused {
        /// The port.
        port: PciAddress,
        /// How many were wanted.
        wanted: u16,
        /// How many it has now.
        left: u16,
        /// What the kernel said.
        #[source]
        source: KernelError,
    },
    /// The driver made fewer than it was asked for, and says that this is success.
    #[error("VF count {wanted} of {port}: its driver made {made}; ask for at most that")]
    Fewer {
        /// The port.
        port: PciAddress,
        /// How many were wanted.
        wanted: u16,
        /// How many there are.
        made: u16,
    },
    /// They are made, and something of them did not appear in time.
    #[error("VF count {wanted} of {port}: after {limit:?} {missing}; see the kernel's log, or wait longer")]
    TimedOut {
        /// The port.
        port: PciAddress,
        /// How many were wanted.
        wanted: u16,
        /// How long it was waited.
        limit: Duration,
        /// What is missing.
        missing: Missing,
    },
    /// The port cannot be looked at, or its autoprobe cannot be written: nothing was changed; or, once the number is
    /// written, what came of it cannot be looked at.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Who has the functions cannot be told.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// What of new functions did not appear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// The function itself (`virtfnN`).
    Function(VfIndex),
    /// Its driver: none is loaded that knows it.
    Driver(VfIndex),
    /// Its network device.
    Netdev(VfIndex),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(index) => write!(f, "VF {index} is missing"),
            Self::Driver(index) => write!(f, "VF {index} has no driver"),
            Self::Netdev(index) => write!(f, "VF {index} has no network device"),
        }
    }
}

struct Left(u16);

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, " (it has {} now)", self.0)
    }
}

/// Gives a port so many functions, and returns them when they are there: with drivers and network devices, where drivers
/// are bound to them.
///
/// Drivers may take the port's carrier away meanwhile, as igb does: it comes back some time after this returns.
///
/// Where it has as many already nothing is written. Where the driver refuses, the number that was is written again, as far
/// as it takes that; what the functions were set to is lost. So it is where anything else fails after the functions are gone.
/// Autoprobe goes back, too, and it is not waited for the functions then.
///
/// # Errors
/// See [`CountError`].
///
/// # Minimum kernel version
/// 3.8; 4.12 for `autoprobe`.
///
/// Bed: igb; what refuses and withholds, modelled.
pub fn set_vf_count(
    kernel: &dyn Kernel,
    port: PciAddress,
    request: &CountRequest<'_>,
) -> Result<Vec<(VfIndex, PciAddress)>, CountError> {
    change_vf_count(kernel, port, request, &mut false)
}

/// As [`set_vf_count`], and says whether the functions are others than before, whatever comes of it.
pub(crate) fn change_vf_count(
    kernel: &dyn Kernel,
    port: PciAddress,
    request: &CountRequest<'_>,
    anew: &mut bool,
) -> Result<Vec<(VfIndex, PciAddress)>, CountError> {
    let CountRequest { count: wanted, autoprobe, limit, .. } = *request;
    let before = kernel.vf_count(port)?;
    if wanted > before.total {
        return Err(CountError::TooMany { port, wanted, total: before.total });
    }
    let changes = before.now != wanted;
    if changes && before.now != 0 {
        refuse_where_used(kernel, port, request)?;
    }
    // It hears of what appears while the write is under way.
    let mut watch = kernel.watch()?;
    // First: it alone can be refused without anything being lost.
    if let Some(autoprobe) = autoprobe.filter(|autoprobe| *autoprobe != before.autoprobe) {
        kernel.write_autoprobe(port, autoprobe)?;
    }
    if !changes {
        return wait(kernel, port, request, &mut *watch, |_, _| Ok(None));
    }
    if let Err(source) = remake(kernel, port, before.now, wanted, anew) {
        put_back(kernel, port, before);
        let left = kernel.vf_count(port).map_or(before.now, |count| count.now);
        return Err(match source.errno {
            Some(libc::EBUSY) => CountError::Raced { port, left },
            Some(libc::ENOENT) => CountError::NoDriver { port, left },
            Some(libc::ERANGE) => CountError::TooMany { port, wanted, total: before.total },
            Some(libc::ENOSPC | libc::ENOMEM) => CountError::Exhausted { port, wanted, left, source },
            _ => CountError::Refused { port, wanted, left, source },
        });
    }
    let made = kernel.vf_count(port).inspect_err(|_| put_back(kernel, port, before))?.now;
    if made != wanted {
        return Err(CountError::Fewer { port, wanted, made });
    }
    tracing::debug!(%port, wanted, ?limit, "virtual functions made");
    let bound = autoprobe.unwrap_or(before.autoprobe);
    wait(
        kernel,
        port,
        request,
        &mut *watch,
        |index, function| if bound { is_ready(kernel, index, function) } else { Ok(None) },
    )
}

fn refuse_where_used(kernel: &dyn Kernel, port: PciAddress, request: &CountRequest<'_>) -> Result<(), CountError> {
    for (_, function) in kernel.vf_addresses(port)? {
        let mut user = (request.user)(function);
        if user.is_none() && !request.even_elsewhere {
            user = match kernel.driver(function)?.driver {
                // The write would wait until a virtual machine lets it go (`vfio_unregister_group_dev` in
                // drivers/vfio/vfio_main.c), or take it away.
                Some(driver) if is_for_user_space(&driver) => Some(format!("a program, by its driver {driver}")),
                Some(_) if kernel.netdevs(&Namespace::Host, function)?.is_empty() => {
                    Some("somebody in another network namespace, where its device is".to_owned())
                }
                _ => None,
            };
        }
        if let Some(user) = user {
            return Err(CountError::InUse { port, function, user });
        }
    }
    Ok(())
}

/// From one number to another, by way of 0.
fn remake(kernel: &dyn Kernel, port: PciAddress, before: u16, wanted: u16, anew: &mut bool) -> Result<(), KernelError> {
    if before != 0 {
        kernel.write_vf_count(port, 0)?;
    }
    *anew = true;
    if wanted != 0 {
        kernel.write_vf_count(port, wanted)?;
    }
    Ok(())
}

fn put_back(kernel: &dyn Kernel, port: PciAddress, before: VfCount) {
    // What cannot be looked at is taken to differ.
    let now = kernel.vf_count(port).ok();
    // Before the number: it decides whether drivers are bound to the functions that come.
    if now.is_none_or(|now| now.autoprobe != before.autoprobe)
        && let Err(error) = kernel.write_autoprobe(port, before.autoprobe)
    {
        tracing::warn!(%port, %error, "autoprobe is not what it was");
    }
    if before.now != 0
        && now.is_none_or(|now| now.now != before.now)
        && let Err(error) = kernel.write_vf_count(port, before.now)
    {
        tracing::warn!(%port, %error, "the former number of virtual functions is not taken either");
    }
}

fn is_ready(kernel: &dyn Kernel, index: VfIndex, function: PciAddress) -> Result<Option<Missing>, KernelError> {
    match kernel.driver(function)?.driver {
        None => Ok(Some(Missing::Driver(index))),
        Some(driver) if is_for_user_space(&driver) => Ok(None),
        Some(_) => {
            let found = kernel.netdevs(&Namespace::Host, function)?;
            Ok(found.is_empty().then_some(Missing::Netdev(index)))
        }
    }
}

/// Waits until all functions are there and nothing of any is missing.
fn wait(
    kernel: &dyn Kernel,
    port: PciAddress,
    request: &CountRequest<'_>,
    watch: &mut dyn Watch,
    missing: impl Fn(VfIndex, PciAddress) -> Result<Option<Missing>, KernelError>,
) -> Result<Vec<(VfIndex, PciAddress)>, CountError> {
    let deadline = Instant::now() + request.limit;
    let look = || -> Result<Result<Vec<(VfIndex, PciAddress)>, Missing>, KernelError> {
        let all = kernel.vf_addresses(port)?;
        if let Some(index) = (0..request.count).map(VfIndex).find(|n| !all.iter().any(|(index, _)| index == n)) {
            return Ok(Err(Missing::Function(index)));
        }
        for (index, function) in &all {
            // What is listed may not be there yet.
            match missing(*index, *function) {
                Ok(None) => {}
                Ok(Some(missing)) => return Ok(Err(missing)),
                Err(error) if error.class == crate::kernel::ErrorClass::Gone => {
                    return Ok(Err(Missing::Function(*index)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Ok(all))
    };
    loop {
        let missing = match look()? {
            Ok(all) => return Ok(all),
            Err(missing) => missing,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CountError::TimedOut { port, wanted: request.count, limit: request.limit, missing });
        }
        // In a container events may not come.
        watch.wait(left.min(LONGEST))?;
    }
}

/// How long it is waited for an event before looking all the same.
const LONGEST: Duration = Duration::from_millis(500);
