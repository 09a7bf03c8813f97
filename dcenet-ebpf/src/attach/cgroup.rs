//! Programs on cgroups: what the processes of a cgroup and of those below it may connect to, send and receive.
//!
//! A cgroup is no device, and no program ends the chain: the kernel asks all programs of the cgroup and then those above it
//! (kernel/bpf/cgroup.c, `bpf_prog_run_array_cg`), and denies what one of them denies. So [`CgroupAttacher`] has the verbs of
//! [`Attacher`](super::Attacher) without `before` and `evict`, on a [`CgroupHook`].
//!
//! Two things that programs of others, who run behind ours, can do all the same at connect(2) and sendmsg(2): rewrite the
//! address that ours has let pass, and, with `bpf_set_retval` (Linux 5.18), take a denial back. Who may attach such programs
//! has CAP_NET_ADMIN in the first user namespace. Packets have neither.
//!
//! A program that was attached with `BPF_F_ALLOW_OVERRIDE`, as older agents do, is no longer asked for a cgroup below it once
//! that has one of its own. Ours does not do that to it: [`CgroupAttacher::attach`] refuses.
//!
//! A program answers 1 to let pass and 0 to deny: connect(2) and sendmsg(2) then fail with `EPERM`, as does a send
//! whose packet an egress program drops; a packet that comes in is dropped in silence.
//!
//! # Example
//! No IPv4 socket of a cgroup's processes connects to the metadata service of a cloud. The point goes by the socket's family
//! and not by the address: an IPv6 socket that connects to `::ffff:169.254.169.254` is asked at
//! [`ProgramKind::Connect6`], a datagram that is sent without a connection at [`ProgramKind::SendMsg4`], and a raw socket's
//! packets at [`ProgramKind::CgroupSkbEgress`] alone, which sees the packets of all.
//!
//! ```no_run
//! use dcenet_ebpf::asm::Asm;
//! use dcenet_ebpf::attach::{Cgroup, CgroupAttacher, CgroupHook};
//! use dcenet_ebpf::insn::{Cond, Reg::*, Size};
//! use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
//! use dcenet_ebpf::object::{Object, ProgramKind};
//! use dcenet_ebpf::pin::{DEFAULT_DIRECTORY, Pins};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut code = Asm::program("no_metadata", ProgramKind::Connect4);
//! let deny = code.label();
//! let user_ip4 = 4; // of struct bpf_sock_addr
//! code.load(Size::W, R2, R1, user_ip4)
//!     .jump_if(Cond::Eq, R2, u32::from_ne_bytes([169, 254, 169, 254]).cast_signed(), deny)
//!     .ret(1)
//!     .bind(deny)
//!     .ret(0);
//! let mut object = Object::new();
//! object.add(code.finish()?)?;
//!
//! let mut loaded = AyaLoader.load(&object.to_elf()?, &LoadRequest::default())?;
//! let program = loaded.take_program("no_metadata").ok_or("the program just written")?;
//! let cgroup = Cgroup::open(Cgroup::mount_point()?.join("system.slice/web.service"))?;
//! let attacher = CgroupAttacher::new(Pins::open(DEFAULT_DIRECTORY)?);
//! attacher.attach(CgroupHook { cgroup: &cgroup, point: ProgramKind::Connect4 }, &program, "web")?;
//! # Ok(())
//! # }
//! ```

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Owner;
use super::pinned::{self, Swap};
use crate::object::ProgramKind;
use crate::pin::{PinError, Pins};
use crate::program::{self, Program};
use crate::sys::fault::gated;
use crate::sys::{self, Asked, SysError};

/// A cgroup of version 2, held open.
#[derive(Debug)]
pub struct Cgroup {
    directory: File,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens a cgroup by its directory.
    ///
    /// # Errors
    /// [`CgroupError::NotACgroup`] for a file, and for a directory elsewhere, also in a hierarchy of version 1.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, CgroupError> {
        let path = path.into();
        let failed = |source| CgroupError::Open { path: path.clone(), source };
        // Else the other end of a named pipe would be waited for.
        let open = || File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&path);
        let directory = match gated("open", open) {
            Err(e) if e.is(libc::ENOTDIR) => return Err(CgroupError::NotACgroup(path)),
            directory => directory.map_err(failed)?,
        };
        if !sys::is_cgroup2(directory.as_fd()).map_err(failed)? {
            return Err(CgroupError::NotACgroup(path));
        }
        // The number of a cgroup is that of its inode (include/linux/kernfs.h, `kernfs_id_ino`).
        let id = gated("fstat", || Ok(directory.metadata()?.ino())).map_err(failed)?;
        Ok(Self { directory, path, id })
    }

    /// Where the hierarchy of version 2 is mounted: alone, as is usual, or beside those of version 1.
    ///
    /// # Errors
    /// [`CgroupError::NotMounted`] where it is not.
    pub fn mount_point() -> Result<PathBuf, CgroupError> {
        const MOUNTS: &str = "/proc/self/mountinfo";
        let text = gated("read", || std::fs::read(MOUNTS))
            .map_err(|source| CgroupError::Open { path: MOUNTS.into(), source })?;
        mount_point(&text).ok_or(CgroupError::NotMounted)
    }

    /// Its directory, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's number of it, which no other gets until the machine starts again.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The mount of the hierarchy's root where there is one, of a part of it otherwise (proc_pid_mountinfo(5)).
fn mount_point(mounts: &[u8]) -> Option<PathBuf> {
    let found = mounts.split(|b| *b == b'\n').filter_map(|line| {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        // Optional fields, and their end, come behind the first six.
        let mut optional = fields.get(6..)?.iter();
        optional.find(|field| **field == b"-")?;
        let is_cgroup2 = *optional.next()? == b"cgroup2";
        is_cgroup2.then(|| (fields[3] != b"/", unescaped(fields[4])))
    });
    found.min_by_key(|(part, _)| *part).map(|(_, path)| path)
}

/// Blanks, tabs, newlines and backslashes are three octal digits behind a backslash.
fn unescaped(mut field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    while let Some((first, rest)) = field.split_first() {
        let octal = rest.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match octal.filter(|_| *first == b'\\') {
            Some(byte) => {
                path.push(byte);
                field = &rest[3..];
            }
            None => {
                path.push(*first);
                field = rest;
            }
        }
    }
    std::ffi::OsString::from_vec(path).into()
}

/// A place for programs on a cgroup.
#[derive(Debug, Clone, Copy)]
pub struct CgroupHook<'a> {
    /// The cgroup. Those below it are meant, too.
    pub cgroup: &'a Cgroup,
    /// What is asked of its programs, and the kind of program that is.
    pub point: ProgramKind,
}

/// One program on a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CgroupAttached {
    /// Whose it is.
    pub owner: Owner,
    /// The program's number.
    pub program: u32,
    /// The hash of the program's instructions; none where it was taken off at this moment.
    pub tag: Option<[u8; 8]>,
}

/// A pinned link to a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CgroupLink {
    /// What it was attached under.
    pub label: String,
    /// What it is asked.
    pub point: ProgramKind,
    /// The link's number.
    pub link: u32,
    /// The program's number.
    pub program: u32,
    /// The number of the cgroup ([`Cgroup::id`]); none once it was removed, or somebody has detached the link.
    pub cgroup: Option<u64>,
}

/// Attaches by links, each pinned under a name made of its point, its number and the label; one of ours on each
/// [`CgroupHook`], beside those of others. It outlives the process, and goes with the cgroup, but for its pin
/// ([`CgroupAttacher::remove_vanished`]).
///
/// Any number of processes may use the same pins at once. Labels have at most 160 letters, digits, `-` and `_`.
///
/// # Privileges
/// CAP_BPF and CAP_NET_ADMIN, and CAP_SYS_ADMIN to look at programs by their numbers, all in the first user namespace.
///
/// # Minimum kernel version
/// 5.9 (`BPF_LINK_DETACH`).
#[derive(Debug, Clone)]
pub struct CgroupAttacher {
    pins: Pins,
}

impl CgroupAttacher {
    /// Pins links here.
    pub fn new(pins: Pins) -> Self {
        Self { pins }
    }

    /// Puts the program on the hook, in place of what we have there: whatever the cgroup's processes do is asked of the old
    /// or of the new one. Returns what was replaced.
    ///
    /// # Errors
    /// On any error the hook is as before. [`CgroupError::Occupied`] where somebody holds the cgroup, or one above it, for
    /// programs of their own alone, or has a program above that would not be asked any more. [`CgroupError::WrongProgram`] for
    /// a program that was loaded for another point.
    pub fn attach(
        &self,
        hook: CgroupHook<'_>,
        program: &Program,
        label: &str,
    ) -> Result<Option<CgroupAttached>, CgroupError> {
        check(hook, program, label)?;
        let _lock = pinned::lock(&self.pins)?;
        let Some((pin, ours)) = self.ours(hook)? else { return self.create(hook, program, label).map(|()| None) };
        match self.swap(hook, &pin, program, label) {
            Err(CgroupError::NotAttached { .. }) => Err(raced(hook)),
            swapped => swapped.map(|()| Some(ours)),
        }
    }

    /// As [`CgroupAttacher::attach`], but only where ours is on the hook already.
    ///
    /// # Errors
    /// [`CgroupError::NotAttached`] where it is not.
    pub fn replace(&self, hook: CgroupHook<'_>, program: &Program, label: &str) -> Result<CgroupAttached, CgroupError> {
        check(hook, program, label)?;
        let Some(_lock) = self.lock()? else { return Err(not_attached(hook)) };
        let (pin, ours) = self.ours(hook)?.ok_or_else(|| not_attached(hook))?;
        self.swap(hook, &pin, program, label)?;
        Ok(ours)
    }

    /// Takes ours off the hook; `false` where there was none.
    pub fn detach(&self, hook: CgroupHook<'_>) -> Result<bool, CgroupError> {
        let Some(_lock) = self.lock()? else { return Ok(false) };
        let Some((pin, _)) = self.ours(hook)? else { return Ok(false) };
        pinned::take_off(&self.pins, sys::LINK_TYPE_CGROUP, &pin)
    }

    /// Ours on the hook, with its label. How a process that was restarted learns what stands.
    pub fn attached(&self, hook: CgroupHook<'_>) -> Result<Option<CgroupAttached>, CgroupError> {
        Ok(self.ours(hook)?.map(|(_, ours)| ours))
    }

    /// Every program of the cgroup itself, without those of cgroups above it.
    pub fn chain(&self, hook: CgroupHook<'_>) -> Result<Vec<CgroupAttached>, CgroupError> {
        let ours = self.attached(hook)?;
        let (programs, _) = sys::query_cgroup(hook.cgroup.as_fd(), program::attach_type(hook.point), Asked::Own)?;
        let mut chain = Vec::new();
        for program in programs {
            match &ours {
                Some(ours) if ours.program == program => chain.push(ours.clone()),
                _ => chain.push(describe(program, None)?),
            }
        }
        Ok(chain)
    }

    /// Every link that is pinned here, also those whose cgroup is no more.
    pub fn links(&self) -> Result<Vec<CgroupLink>, CgroupError> {
        let mut links = Vec::new();
        for pin in self.names()? {
            let Some((point, _, label)) = parse(&pin) else { continue };
            if let Some((_, info)) = pinned::open::<CgroupError>(&self.pins, sys::LINK_TYPE_CGROUP, &pin)? {
                let cgroup = (info.cgroup != 0).then_some(info.cgroup);
                links.push(CgroupLink { label: label.to_owned(), point, link: info.id, program: info.program, cgroup });
            }
        }
        Ok(links)
    }

    /// Takes off whatever has this label, and its pins with it. Returns how many links there were.
    pub fn release(&self, label: &str) -> Result<usize, CgroupError> {
        let Some(_lock) = self.lock()? else { return Ok(0) };
        let mut taken = 0;
        for pin in self.names()?.iter().filter(|pin| parse(pin).is_some_and(|(_, _, l)| l == label)) {
            taken += usize::from(pinned::take_off::<CgroupError>(&self.pins, sys::LINK_TYPE_CGROUP, pin)?);
        }
        Ok(taken)
    }

    /// Removes the pins of cgroups that are no more, and tells which.
    pub fn remove_vanished(&self) -> Result<Vec<CgroupLink>, CgroupError> {
        let Some(_lock) = self.lock()? else { return Ok(Vec::new()) };
        let mut vanished = self.links()?;
        vanished.retain(|link| link.cgroup.is_none());
        for link in &vanished {
            self.pins.remove(&name(link.point, link.link, &link.label))?;
        }
        Ok(vanished)
    }

    fn create(&self, hook: CgroupHook<'_>, program: &Program, label: &str) -> Result<(), CgroupError> {
        let attach_type = program::attach_type(hook.point);
        if gives_way(hook.cgroup, attach_type)? {
            return Err(occupied(hook));
        }
        let effective = || Ok::<_, SysError>(sys::query_cgroup(hook.cgroup.as_fd(), attach_type, Asked::Effective)?.0);
        let before = effective()?;
        let link = sys::create_cgroup_link(program.as_fd(), hook.cgroup.as_fd(), attach_type).map_err(|e| {
            match e.raw_os_error() {
                // kernel/bpf/cgroup.c, `hierarchy_allows_attach`.
                Some(libc::EPERM) => occupied(hook),
                // The verifier was told of another point than this (kernel/bpf/syscall.c, `bpf_prog_attach_check_attach_type`).
                Some(libc::EINVAL) => wrong_program(hook, program),
                _ => e.into(),
            }
        })?;
        // Without its pin it ends with this descriptor: what fails or dies here leaves the hook as it was.
        let all_of = |before: &[u32], now: &[u32]| before.iter().all(|program| now.contains(program));
        if !all_of(&before, &effective()?) {
            // One above that this mount does not show gives way; or somebody has taken one off at this moment.
            sys::detach_link(link.as_fd())?;
            return Err(if all_of(&before, &effective()?) { occupied(hook) } else { raced(hook) });
        }
        let info = sys::link_info(link.as_fd())?.ok_or_else(pinned::no_link)?;
        self.pins.pin(&name(hook.point, info.id, label), &link)?;
        Ok(())
    }

    fn swap(&self, hook: CgroupHook<'_>, pin: &str, program: &Program, label: &str) -> Result<(), CgroupError> {
        // An exchange of programs compares their types alone (kernel/bpf/cgroup.c, `__cgroup_bpf_replace`).
        if !sys::is_for_cgroup_point(program.as_fd(), program::attach_type(hook.point))? {
            return Err(wrong_program(hook, program));
        }
        let fresh = |link| Ok::<_, CgroupError>(name(hook.point, link, label));
        match pinned::swap(&self.pins, sys::LINK_TYPE_CGROUP, pin, program, fresh)? {
            Swap::Done => Ok(()),
            Swap::Gone => Err(not_attached(hook)),
            Swap::SameProgram | Swap::Raced => Err(raced(hook)),
        }
    }

    /// The pin of ours, and what it holds on the hook.
    fn ours(&self, hook: CgroupHook<'_>) -> Result<Option<(String, CgroupAttached)>, CgroupError> {
        for pin in self.names()? {
            let Some((point, _, label)) = parse(&pin) else { continue };
            if point != hook.point {
                continue;
            }
            let Some((_, info)) = pinned::open::<CgroupError>(&self.pins, sys::LINK_TYPE_CGROUP, &pin)? else {
                continue;
            };
            let place = (info.cgroup, info.cgroup_attach_type);
            if place == (hook.cgroup.id, program::attach_type(hook.point)) {
                let attached = describe(info.program, Some(label))?;
                return Ok(Some((pin, attached)));
            }
        }
        Ok(None)
    }

    fn names(&self) -> Result<Vec<String>, CgroupError> {
        match self.pins.list() {
            Ok(mut names) => {
                names.retain(|name| parse(name).is_some());
                Ok(names)
            }
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(Vec::new()),
            Err(e) => Err(e.into()),
        }
    }

    /// None where there is no place for pins, and so no pin.
    fn lock(&self) -> Result<Option<File>, CgroupError> {
        match pinned::lock(&self.pins) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            lock => Ok(Some(lock?)),
        }
    }
}

/// Whether a program above is asked for this cgroup only until it has one of its own (kernel/bpf/cgroup.c,
/// `compute_effective_progs`).
fn gives_way(cgroup: &Cgroup, attach_type: u32) -> Result<bool, CgroupError> {
    let failed = |source| CgroupError::Open { path: cgroup.path.clone(), source };
    let mut at = gated("dup", || cgroup.directory.try_clone()).map_err(failed)?;
    for _ in 0..DEEPEST {
        let (programs, flags) = sys::query_cgroup(at.as_fd(), attach_type, Asked::Own)?;
        if !programs.is_empty() {
            return Ok(flags & sys::ALLOW_MULTI == 0);
        }
        // By the descriptor, for the path may lead elsewhere by now.
        let above = format!("/proc/self/fd/{}/..", at.as_raw_fd());
        at = match gated("open", || File::open(above)) {
            // It is removed at this moment.
            Err(e) if e.is(libc::ENOENT) => return Ok(false),
            above => above.map_err(failed)?,
        };
        if !sys::is_cgroup2(at.as_fd()).map_err(failed)? {
            break;
        }
    }
    Ok(false)
}

/// What a hook is called in the name of a pin.
fn word(point: ProgramKind) -> Option<&'static str> {
    match point {
        ProgramKind::CgroupSkbIngress => Some("ingress"),
        ProgramKind::CgroupSkbEgress => Some("egress"),
        ProgramKind::Connect4 => Some("connect4"),
        ProgramKind::Connect6 => Some("connect6"),
        ProgramKind::SendMsg4 => Some("sendmsg4"),
        ProgramKind::SendMsg6 => Some("sendmsg6"),
        ProgramKind::Classifier | ProgramKind::Xdp => None,
    }
}

fn name(point: ProgramKind, link: u32, label: &str) -> String {
    pinned::name(NAME, word(point).unwrap_or_default(), link, label)
}

fn parse(pin: &str) -> Option<(ProgramKind, u32, &str)> {
    let (place, link, label) = pinned::parse(NAME, pin)?;
    let point = ProgramKind::ALL.into_iter().find(|point| word(*point) == Some(place))?;
    Some((point, link, label))
}

fn describe(program: u32, label: Option<&str>) -> Result<CgroupAttached, SysError> {
    let info = match sys::program_by_id(program).and_then(|fd| sys::program_info(fd.as_fd())) {
        // Taken off since the cgroup was asked for.
        Err(e) if e.is(libc::ENOENT) => None,
        info => Some(info?),
    };
    let owner = match label {
        Some(label) => Owner::Ours(label.to_owned()),
        None => Owner::Foreign(info.as_ref().map(|i| i.name.clone())),
    };
    Ok(CgroupAttached { owner, program, tag: info.map(|i| i.tag) })
}

fn check(hook: CgroupHook<'_>, program: &Program, label: &str) -> Result<(), CgroupError> {
    if word(hook.point).is_none() || program.info().kind != program::number(hook.point) {
        return Err(wrong_program(hook, program));
    }
    if !pinned::is_label(label) {
        return Err(CgroupError::BadLabel { label: label.to_owned(), want: pinned::LABEL });
    }
    Ok(())
}

fn wrong_program(hook: CgroupHook<'_>, program: &Program) -> CgroupError {
    CgroupError::WrongProgram { program: program.info().name.clone(), kind: program.info().kind, point: hook.point }
}

fn occupied(hook: CgroupHook<'_>) -> CgroupError {
    CgroupError::Occupied { cgroup: hook.cgroup.path.clone(), point: hook.point }
}

fn not_attached(hook: CgroupHook<'_>) -> CgroupError {
    CgroupError::NotAttached { cgroup: hook.cgroup.path.clone(), point: hook.point }
}

fn raced(hook: CgroupHook<'_>) -> CgroupError {
    CgroupError::Raced { cgroup: hook.cgroup.path.clone(), point: hook.point }
}

/// Why a program is not on, or not off, a cgroup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// The directory cannot be opened.
    #[error("cgroup {}: {source}", path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// What the kernel answered.
        source: SysError,
    },
    /// It is no cgroup of version 2.
    #[error("{} is no cgroup of version 2; name one below the mount of type cgroup2", .0.display())]
    NotACgroup(PathBuf),
    /// There is no hierarchy of version 2.
    #[error("no hierarchy of type cgroup2 is mounted; mount one")]
    NotMounted,
    /// Nothing of ours to replace.
    #[error("nothing of dcenet's is attached to cgroup {} ({point:?}); attach first", cgroup.display())]
    NotAttached {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// What is asked.
        point: ProgramKind,
    },
    /// A program there, or above, was attached so that it suffers no others.
    #[error(
        "cgroup {} ({point:?}): here or above a program is attached without BPF_F_ALLOW_MULTI, or privileges are missing; \
         attach that one by a link",
        cgroup.display()
    )]
    Occupied {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// What is asked.
        point: ProgramKind,
    },
    /// The program is of another kind than the hook takes.
    #[error("program {program} is of type {kind}, or loaded for another point; load it as {point:?}")]
    WrongProgram {
        /// The program's name.
        program: String,
        /// Its type, a value of `enum bpf_prog_type`.
        kind: u32,
        /// What it was to be asked.
        point: ProgramKind,
    },
    /// The label cannot be stored.
    #[error("label {label:?}: want {want}")]
    BadLabel {
        /// The label.
        label: String,
        /// What is taken.
        want: &'static str,
    },
    /// Somebody else changed the hook at the same time.
    #[error("cgroup {} ({point:?}): somebody else changes the programs at the same time; try again", cgroup.display())]
    Raced {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// What is asked.
        point: ProgramKind,
    },
    /// The pins cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// bpf(2) refused.
    #[error(transparent)]
    Sys(#[from] SysError),
}

impl CgroupError {
    /// The errno behind the error, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Open { source, .. } => source.raw_os_error(),
            Self::Pin(e) => e.raw_os_error(),
            Self::Sys(e) => e.raw_os_error(),
            _ => None,
        }
    }
}

/// Stands first in the names of pins.
const NAME: &str = "cgroup";
/// How many cgroups above one are looked at: a path of 4 KiB has no more.
const DEEPEST: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_is_where_mountinfo_says() {
        let line =
            |root: &str, at: &str, kind: &str| format!("30 23 0:26 {root} {at} rw,relatime shared:4 - {kind} c rw\n");
        let found = |lines: &[String]| mount_point(lines.concat().as_bytes());
        assert_eq!(found(&[line("/", "/sys/fs/cgroup/cpu", "cgroup"), line("/", "/tmp", "tmpfs")]), None);
        let unified = line("/", "/sys/fs/cgroup/unified", "cgroup2");
        assert_eq!(
            found(&[line("/", "/sys/fs/cgroup", "tmpfs"), unified.clone()]),
            Some("/sys/fs/cgroup/unified".into())
        );
        // A part of it, mounted into a container, is taken only where there is no better.
        let part = line("/pods/a", "/a\\040b\\134c", "cgroup2");
        assert_eq!(found(&[part.clone(), unified]), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(found(&[part]), Some("/a b\\c".into()));
        for bad in ["", "30", "- cgroup2", "30 23 0:26 / -", "30 23 0:26 - cgroup2"] {
            assert_eq!(mount_point(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn names_of_pins_read_as_written() {
        for point in ProgramKind::ALL.into_iter().filter(|point| word(*point).is_some()) {
            assert_eq!(parse(&name(point, 7, "web-1")), Some((point, 7, "web-1")));
        }
        for other in ["", "cgroup", "cgroup--7-x", "cgroup-bind4-7-x", "tcx-ingress-7-x", "cgroup-ingress-x-7"] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
