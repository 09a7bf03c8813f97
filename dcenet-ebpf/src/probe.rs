//! What the running kernel can do.
//!
//! Asked by trying, never by its version: distributions take features back to old kernels, and switch others off.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Mutex;

use crate::insn::IsaLevel;
use crate::object::{MapSpec, ProgramKind};
use crate::program;
use crate::sys::{self, LoadFailure, Map, RawProgram, SysError};

/// Helpers whose presence decides how programs are written (`enum bpf_func_id`).
mod helper {
    pub(super) const TAIL_CALL: i32 = 12;
    pub(super) const GET_NETNS_COOKIE: i32 = 122;
    pub(super) const KTIME_GET_BOOT_NS: i32 = 125;
    pub(super) const KTIME_GET_COARSE_NS: i32 = 160;
    pub(super) const LOOP: i32 = 181;
}

/// What the running kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// Classifiers can be loaded (`BPF_PROG_TYPE_SCHED_CLS`, Linux 4.1).
    pub classifier: bool,
    /// tcx links (Linux 6.6).
    pub tcx: bool,
    /// netkit links (Linux 6.7, if built with `CONFIG_NETKIT`).
    pub netkit: bool,
    /// 32-bit compare and jump, instruction set v3 (Linux 5.1).
    pub isa_v3: bool,
    /// Long jumps (`gotol`), sign extension and byte swaps of instruction set v4 (Linux 6.6).
    pub isa_v4: bool,
    /// Ring buffers (Linux 5.8).
    pub ring_buffer: bool,
    /// Many map entries in one call (Linux 5.6).
    pub map_batch: bool,
    /// `bpf_loop` (Linux 5.17).
    pub bpf_loop: bool,
    /// `bpf_ktime_get_boot_ns` (Linux 5.8).
    pub ktime_boot_ns: bool,
    /// `bpf_ktime_get_coarse_ns` (Linux 5.11): a tenth of the cost of the exact clock.
    pub ktime_coarse_ns: bool,
    /// `bpf_get_netns_cookie` in classifiers (Linux 6.13).
    pub netns_cookie: bool,
    /// Tail calls in programs with functions of their own, for which the JIT of the processor must be made (Linux 5.10 on x86-64,
    /// 6.0 on arm64). Without them what a rule rejects is not answered ([`crate::datapath::answer`]).
    pub tail_calls_beside_functions: bool,
}

impl Features {
    /// Asks the kernel, the first time; a success is remembered for the life of the process.
    ///
    /// # Errors
    /// A feature that is missing is no error. Missing privileges are, and a kernel without bpf(2).
    pub fn probe() -> Result<Self, ProbeError> {
        static KNOWN: Mutex<Option<Features>> = Mutex::new(None);
        let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(features) = *known {
            return Ok(features);
        }
        let features = Self::ask()?;
        tracing::debug!(?features, "kernel features");
        *known = Some(features);
        Ok(features)
    }

    /// The highest level of the instruction set at which programs can be written. [`IsaLevel::V3`] is what the programs of
    /// [`crate::datapath`] need; [`IsaLevel::V4`] spares large ones their islands.
    pub const fn isa(&self) -> IsaLevel {
        match self {
            Self { isa_v4: true, .. } => IsaLevel::V4,
            Self { isa_v3: true, .. } => IsaLevel::V3,
            _ => IsaLevel::V2,
        }
    }

    /// What the programs of [`crate::datapath`], written at a level, cannot do without and the kernel lacks; empty where
    /// they will do.
    pub fn missing_for_datapath(&self, isa: IsaLevel) -> Vec<Missing> {
        let needed = [
            (self.classifier, Missing { feature: "classifiers (BPF_PROG_TYPE_SCHED_CLS)", since: "4.1" }),
            (self.isa_v3, Missing { feature: "32-bit jumps (instruction set v3)", since: "5.1" }),
            (
                self.isa_v4 || isa < IsaLevel::V4,
                Missing { feature: "long jumps (instruction set v4; programs at v3 do without)", since: "6.6" },
            ),
            (self.ring_buffer, Missing { feature: "ring buffers (BPF_MAP_TYPE_RINGBUF)", since: "5.8" }),
            (self.ktime_coarse_ns, Missing { feature: "the coarse clock (bpf_ktime_get_coarse_ns)", since: "5.11" }),
        ];
        needed.into_iter().filter(|(has, _)| !has).map(|(_, missing)| missing).collect()
    }

    fn ask() -> Result<Self, ProbeError> {
        let empty = [insn(0xb7, 0, 0, 0, 0), EXIT].concat();
        let (classifier, tcx, netkit) = match load(&empty) {
            Ok(program) => {
                let known = |attach_type| sys::device_link_known(program.as_fd(), attach_type);
                (true, known(sys::TCX_INGRESS)?, known(sys::NETKIT_PRIMARY)?)
            }
            Err(failure) if is_about_us(&failure.error) => return Err(failure.error.into()),
            Err(_) => (false, false, false),
        };
        Ok(Self {
            classifier,
            tcx,
            netkit,
            // if w0 == 0 goto +0
            isa_v3: loads(&[insn(0xb7, 0, 0, 0, 0), insn(0x16, 0, 0, 0, 0), EXIT].concat())?,
            // r0 = (s8)r0; r0 = bswap16 r0; gotol +0
            isa_v4: loads(
                &[
                    insn(0xb7, 0, 0, 0, 0),
                    insn(0xbf, 0, 0, 8, 0),
                    insn(0xd7, 0, 0, 0, 16),
                    insn(0x06, 0, 0, 0, 0),
                    EXIT,
                ]
                .concat(),
            )?,
            ring_buffer: ring_buffer()?,
            map_batch: map_batch()?,
            bpf_loop: knows_helper(helper::LOOP)?,
            ktime_boot_ns: knows_helper(helper::KTIME_GET_BOOT_NS)?,
            ktime_coarse_ns: knows_helper(helper::KTIME_GET_COARSE_NS)?,
            netns_cookie: knows_helper(helper::GET_NETNS_COOKIE)?,
            tail_calls_beside_functions: tail_calls_beside_functions()?,
        })
    }
}

/// In words: the level of the instruction set, then what there is and what there is not.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { classifier, tcx, netkit, isa_v3: _, isa_v4: _, ring_buffer, map_batch, bpf_loop, .. } = *self;
        let named = [
            (classifier, "classifiers"),
            (tcx, "tcx"),
            (netkit, "netkit"),
            (ring_buffer, "ring buffers"),
            (map_batch, "batches"),
            (bpf_loop, "bpf_loop"),
            (self.ktime_boot_ns, "boot clock"),
            (self.ktime_coarse_ns, "coarse clock"),
            (self.netns_cookie, "namespace cookies"),
            (self.tail_calls_beside_functions, "tail calls beside functions"),
        ];
        write!(f, "instruction set {:?}", self.isa())?;
        named.iter().filter(|(has, _)| *has).try_for_each(|(_, name)| write!(f, ", {name}"))?;
        named.iter().filter(|(has, _)| !has).try_for_each(|(_, name)| write!(f, ", no {name}"))
    }
}

/// A feature that the kernel lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Missing {
    /// What it is.
    pub feature: &'static str,
    /// The first release of Linux that has it.
    pub since: &'static str,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, since Linux {}", self.feature, self.since)
    }
}

/// Why the kernel could not be asked.
#[derive(Debug, thiserror::Error)]
#[error("asking the kernel for its eBPF features: {source} (CAP_BPF and CAP_NET_ADMIN, or root, are needed)")]
pub struct ProbeError {
    #[source]
    source: SysError,
}

impl From<SysError> for ProbeError {
    fn from(source: SysError) -> Self {
        Self { source }
    }
}

fn load(code: &[u8]) -> Result<std::os::fd::OwnedFd, LoadFailure> {
    let kind = program::number(ProgramKind::Classifier);
    sys::load_program(&RawProgram { kind, attach_type: 0, code, name: "probe" })
}

/// Whether a program is accepted; a refusal for want of privileges or memory says nothing and is an error.
fn loads(code: &[u8]) -> Result<bool, ProbeError> {
    match load(code) {
        Ok(_) => Ok(true),
        Err(failure) if is_about_us(&failure.error) => Err(failure.error.into()),
        Err(_) => Ok(false),
    }
}

/// Whether classifiers may call the helper. It is called without arguments, so the verifier refuses the program in any
/// case, and its log tells for which reason (kernel/bpf/verifier.c, `check_helper_call`).
fn knows_helper(number: i32) -> Result<bool, ProbeError> {
    match load(&[insn(0x85, 0, 0, 0, number), insn(0xb7, 0, 0, 0, 0), EXIT].concat()) {
        Ok(_) => Ok(true),
        Err(failure) if is_about_us(&failure.error) => Err(failure.error.into()),
        Err(failure) => {
            let unknown = ["invalid func ", "unknown func ", "program of this type cannot use helper"];
            Ok(!unknown.iter().any(|u| failure.log.contains(u)))
        }
    }
}

fn tail_calls_beside_functions() -> Result<bool, ProbeError> {
    let map = Map::create(&MapSpec::prog_array("probe", 1))?;
    let fd = map.as_fd().as_raw_fd();
    // r6 = r1; call the function at the end; bpf_tail_call(r6, map, 0); return 0
    loads(
        &[
            insn(0xbf, 6, 1, 0, 0),
            insn(0x85, 0, 1, 0, 7),
            insn(0xbf, 1, 6, 0, 0),
            insn(0x18, 2, 1, 0, fd),
            insn(0, 0, 0, 0, 0),
            insn(0xb7, 3, 0, 0, 0),
            insn(0x85, 0, 0, 0, helper::TAIL_CALL),
            insn(0xb7, 0, 0, 0, 0),
            EXIT,
            insn(0xb7, 0, 0, 0, 0),
            EXIT,
        ]
        .concat(),
    )
}

fn ring_buffer() -> Result<bool, ProbeError> {
    let page = u32::try_from(sys::page_size()).unwrap_or(4096);
    match Map::create(&MapSpec::ringbuf("probe", page)) {
        Ok(_) => Ok(true),
        Err(e) if is_about_us(&e) => Err(e.into()),
        Err(_) => Ok(false),
    }
}

fn map_batch() -> Result<bool, ProbeError> {
    let map = Map::create(&MapSpec::hash("probe", 4, 4, 1))?;
    match map.update_batch(&[0; 4], &[0; 4]).1 {
        Ok(()) => Ok(true),
        Err(e) if is_about_us(&e) => Err(e.into()),
        Err(_) => Ok(false),
    }
}

fn is_about_us(error: &SysError) -> bool {
    [libc::EPERM, libc::ENOMEM, libc::EMFILE, libc::ENFILE, libc::ENOSYS].iter().any(|errno| error.is(*errno))
}

/// One instruction in the kernel's form (include/uapi/linux/bpf.h, `struct bpf_insn`).
fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> [u8; 8] {
    let registers = if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
    let [o0, o1] = offset.to_ne_bytes();
    let [i0, i1, i2, i3] = immediate.to_ne_bytes();
    [code, registers, o0, o1, i0, i1, i2, i3]
}

const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};

    use super::*;

    #[test]
    fn features_agree_with_what_this_kernel_is_known_to_have() {
        if !require(Rung::Kernel) {
            return;
        }
        let features = Features::probe().expect("probing as root");
        assert!(features.classifier && features.ring_buffer && features.map_batch && features.isa_v3, "{features:?}");
        // The one place where a version is looked at: to check the answers.
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
        let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
        let version = (numbers.next().expect("major"), numbers.next().expect("minor"));
        if version >= (6, 6) {
            assert!(features.tcx && features.isa_v4 && features.bpf_loop && features.ktime_coarse_ns, "{features:?}");
        }
        if version >= (6, 0) && cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) {
            assert!(features.tail_calls_beside_functions, "{features:?}");
        }
        assert_eq!(
            features.isa(),
            if version >= (6, 6) { IsaLevel::V4 } else { IsaLevel::V3 },
            "{release}: {features}"
        );
        assert_eq!(Features::probe().expect("again"), features);
    }

    #[test]
    fn what_is_missing_is_named_and_nothing_else() {
        let all = Features {
            classifier: true,
            tcx: true,
            netkit: true,
            isa_v3: true,
            isa_v4: true,
            ring_buffer: true,
            map_batch: true,
            bpf_loop: true,
            ktime_boot_ns: true,
            ktime_coarse_ns: true,
            netns_cookie: true,
            tail_calls_beside_functions: true,
        };
        assert_eq!((all.isa(), all.missing_for_datapath(IsaLevel::V4)), (IsaLevel::V4, vec![]));
        let older = Features { isa_v4: false, tcx: false, netkit: false, ..all };
        assert_eq!((older.isa(), older.missing_for_datapath(older.isa())), (IsaLevel::V3, vec![]));
        let [missing] = older.missing_for_datapath(IsaLevel::V4)[..] else { panic!("long jumps") };
        assert!(missing.to_string().contains("v4") && missing.since == "6.6", "{missing}");
        assert!(
            older.to_string().starts_with("instruction set V3, ") && older.to_string().contains(", no tcx"),
            "{older}"
        );
        let oldest = Features { isa_v3: false, ring_buffer: false, ktime_coarse_ns: false, ..older };
        let named: Vec<_> = oldest.missing_for_datapath(oldest.isa()).iter().map(|missing| missing.since).collect();
        assert_eq!((oldest.isa(), named), (IsaLevel::V2, vec!["5.1", "5.8", "5.11"]));
    }

    #[test]
    fn a_helper_that_no_kernel_has_is_unknown() {
        if !require(Rung::Kernel) {
            return;
        }
        assert!(!knows_helper(1_000_000).expect("probing as root"));
    }

    #[test]
    fn want_of_privileges_is_an_error_and_no_missing_feature() {
        use crate::sys::fault::{Fault, Faults};
        if !require(Rung::Kernel) {
            return;
        }
        let count = Faults::count();
        let expected = Features::ask().expect("probing as root");
        let calls = count.calls();
        drop(count);
        assert!(calls > 8, "{calls} calls");
        for at in 0..calls {
            let _faults = Faults::at(at, Fault::Fail(libc::EPERM));
            let asked = Features::ask();
            // A load that is refused is tried once more, for its log, and then succeeds.
            let right = asked.as_ref().map_or(true, |features| *features == expected);
            assert!(right, "call {at}: {asked:?}");
        }
    }
}
