//! The C library libbpf: an object from its bytes to descriptors, and what the library says meanwhile.
//!
//! What is used of it is stable since libbpf 1.0: functions give an errno as `-errno`, or NULL with `errno` set.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};

use libbpf_sys::{__va_list_tag, libbpf_print_fn_t, libbpf_print_level};

use super::text_at;

/// Room for the verifier's log, as much as kernels before 5.2 take at most. Untouched until something is written.
const LOG_BYTES: usize = 16 << 20;
/// Room for a message.
const MESSAGE_BYTES: usize = 1024;

/// How much the verifier tells (`BPF_LOG_LEVEL1`, `BPF_LOG_STATS`; include/linux/bpf_verifier.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verbosity {
    /// Nothing of a program that is taken; of one that is refused, each instruction that was looked at.
    Refusals = 0,
    /// The reason and the statistics alone, which fit into any log.
    Reasons = 4,
}

/// An object that libbpf has open, and loaded once [`Object::load`] has succeeded.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    object: NonNull<libbpf_sys::bpf_object>,
    /// Where the kernel writes, for as long as the object lives.
    log: Vec<u8>,
    /// libbpf reads the file in place.
    file: PhantomData<&'a [u8]>,
}

impl<'a> Object<'a> {
    /// Reads a file.
    pub(crate) fn open(elf: &'a [u8], verbosity: Verbosity) -> io::Result<Self> {
        let mut log = vec![0_u8; LOG_BYTES];
        let options = libbpf_sys::bpf_object_open_opts {
            sz: size_of::<libbpf_sys::bpf_object_open_opts>() as libbpf_sys::size_t,
            kernel_log_buf: log.as_mut_ptr().cast::<c_char>(),
            kernel_log_size: log.len() as libbpf_sys::size_t,
            kernel_log_level: verbosity as u32,
            ..Default::default()
        };
        // SAFETY: the bytes live as long as the object (`'a`), and the options past the call; the log in them is on the
        // heap, where it stays until the object is closed.
        let object =
            unsafe { libbpf_sys::bpf_object__open_mem(elf.as_ptr().cast(), elf.len() as libbpf_sys::size_t, &options) };
        match NonNull::new(object) {
            Some(object) => Ok(Self { object, log, file: PhantomData }),
            None => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the maps and loads the programs. To be called once.
    pub(crate) fn load(&mut self) -> io::Result<()> {
        // SAFETY: the object is open, and nobody else has it.
        check(unsafe { libbpf_sys::bpf_object__load(self.object.as_ptr()) })
    }

    /// What the verifier wrote.
    pub(crate) fn log(&self) -> String {
        text_at(&self.log, 0, self.log.len())
    }

    /// Its maps.
    pub(crate) fn maps(&self) -> Vec<ObjectMap<'_>> {
        let mut maps = Vec::new();
        let mut last = ptr::null_mut();
        loop {
            // SAFETY: the object is open, and `last` is none or one of its maps.
            last = unsafe { libbpf_sys::bpf_object__next_map(self.object.as_ptr(), last) };
            match NonNull::new(last) {
                Some(map) => maps.push(ObjectMap { map, object: PhantomData }),
                None => return maps,
            }
        }
    }

    /// Its programs, but for functions that only other programs call.
    pub(crate) fn programs(&self) -> Vec<ObjectProgram<'_>> {
        let mut programs = Vec::new();
        let mut last = ptr::null_mut();
        loop {
            // SAFETY: the object is open, and `last` is none or one of its programs.
            last = unsafe { libbpf_sys::bpf_object__next_program(self.object.as_ptr(), last) };
            match NonNull::new(last) {
                Some(program) => programs.push(ObjectProgram { program, object: PhantomData }),
                None => return programs,
            }
        }
    }
}

impl Drop for Object<'_> {
    fn drop(&mut self) {
        // SAFETY: the object is open, and nothing uses it afterwards; its maps and programs borrow from it.
        unsafe { libbpf_sys::bpf_object__close(self.object.as_ptr()) };
    }
}

/// A map of an object.
#[derive(Debug)]
pub(crate) struct ObjectMap<'o> {
    map: NonNull<libbpf_sys::bpf_map>,
    object: PhantomData<&'o ()>,
}

impl<'o> ObjectMap<'o> {
    pub(crate) fn name(&self) -> String {
        // SAFETY: the map is the object's, which is open.
        let name = unsafe { libbpf_sys::bpf_map__name(self.map.as_ptr()) };
        // SAFETY: libbpf gives a text that lives as long as the map, or NULL.
        unsafe { text(name) }
    }

    /// Leaves the map unpinned, whatever the file asks for. Before the load.
    pub(crate) fn forget_pin(&self) -> io::Result<()> {
        // SAFETY: the map is the object's, which is open; NULL stands for no path.
        check(unsafe { libbpf_sys::bpf_map__set_pin_path(self.map.as_ptr(), ptr::null()) })
    }

    /// Uses a map that exists, of which libbpf takes a descriptor of its own. Before the load.
    pub(crate) fn reuse(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: the map is the object's, which is open; the descriptor is, too.
        check(unsafe { libbpf_sys::bpf_map__reuse_fd(self.map.as_ptr(), fd.as_raw_fd()) })
    }

    /// Its descriptor. After the load.
    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'o>> {
        // SAFETY: the map is the object's, which is open.
        let fd = unsafe { libbpf_sys::bpf_map__fd(self.map.as_ptr()) };
        check(fd)?;
        // SAFETY: the descriptor is open until the object is closed, and not -1.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }
}

/// A program of an object.
#[derive(Debug)]
pub(crate) struct ObjectProgram<'o> {
    program: NonNull<libbpf_sys::bpf_program>,
    object: PhantomData<&'o ()>,
}

impl<'o> ObjectProgram<'o> {
    pub(crate) fn name(&self) -> String {
        // SAFETY: the program is the object's, which is open.
        let name = unsafe { libbpf_sys::bpf_program__name(self.program.as_ptr()) };
        // SAFETY: libbpf gives a text that lives as long as the program, or NULL.
        unsafe { text(name) }
    }

    /// A value of `enum bpf_prog_type`; 0 where libbpf does not know the section.
    pub(crate) fn kind(&self) -> u32 {
        // SAFETY: the program is the object's, which is open.
        unsafe { libbpf_sys::bpf_program__type(self.program.as_ptr()) }
    }

    /// Its descriptor. After the load.
    pub(crate) fn fd(&self) -> io::Result<BorrowedFd<'o>> {
        // SAFETY: the program is the object's, which is open.
        let fd = unsafe { libbpf_sys::bpf_program__fd(self.program.as_ptr()) };
        check(fd)?;
        // SAFETY: the descriptor is open until the object is closed, and not -1.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }
}

fn check(answer: c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::from_raw_os_error(-answer)) } else { Ok(()) }
}

/// # Safety
/// `text` is NULL or a text that ends in zero.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: not NULL, so a text that ends in zero, as the caller says.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Does something with libbpf, and gives what the library says to this thread meanwhile: warnings, and what it tells for
/// information. What it says to others goes where it went before.
///
/// The library has one function for all that it says (`libbpf_set_print`). Whoever sets one while this runs gets these
/// messages, and they are missing here.
pub(crate) fn hear<T>(work: impl FnOnce() -> T) -> (T, Vec<String>) {
    HEARD.with_borrow_mut(|heard| *heard = Some(Vec::new()));
    let ours: libbpf_print_fn_t = Some(print);
    // SAFETY: the function lives as long as the process, and has the type that libbpf asks for.
    let before = unsafe { libbpf_sys::libbpf_set_print(ours) };
    match before {
        Some(before) if !ptr::fn_addr_eq(before, print as Print) => BEFORE.store(before as usize, Ordering::Release),
        Some(_) => {}
        None => BEFORE.store(0, Ordering::Release),
    }
    let done = work();
    (done, HEARD.take().unwrap_or_default())
}

type Print = unsafe extern "C" fn(libbpf_print_level, *const c_char, *mut __va_list_tag) -> c_int;

thread_local! {
    /// What was said to this thread, while it wants to know.
    static HEARD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
    /// This thread hands a message on, so that functions that hand on to each other end.
    static HANDS_ON: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The function that was set before ours, or 0.
static BEFORE: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    /// printf(3). A `va_list` that is an argument is passed by reference on x86-64 and AArch64, and is a pointer on others.
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut __va_list_tag) -> c_int;
}

/// # Safety
/// As libbpf calls it: the format is a text, and the arguments are those that it asks for.
unsafe extern "C" fn print(level: libbpf_print_level, format: *const c_char, arguments: *mut __va_list_tag) -> c_int {
    let listens = HEARD.try_with(|heard| heard.borrow().is_some()).unwrap_or(false);
    if !listens {
        let before = BEFORE.load(Ordering::Acquire);
        if before == 0 || HANDS_ON.replace(true) {
            return 0;
        }
        // SAFETY: what was stored is a function of this type, which `libbpf_set_print` gave and libbpf would call.
        let before = unsafe { std::mem::transmute::<usize, Print>(before) };
        // SAFETY: libbpf called us so.
        let written = unsafe { before(level, format, arguments) };
        HANDS_ON.set(false);
        return written;
    }
    if level == libbpf_sys::LIBBPF_DEBUG {
        return 0;
    }
    let mut message = vec![0_u8; MESSAGE_BYTES];
    // SAFETY: the buffer has the room stated; libbpf gave format and arguments, which nobody else reads.
    let length = unsafe { vsnprintf(message.as_mut_ptr().cast(), message.len(), format, arguments) };
    if length > 0 {
        let message = text_at(&message, 0, MESSAGE_BYTES);
        HEARD.with_borrow_mut(|heard| heard.get_or_insert_default().push(message.trim_end().to_owned()));
    }
    length
}
