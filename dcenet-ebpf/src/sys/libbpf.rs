//! The C library libbpf: an object from its bytes to descriptors, and what the library says meanwhile.
//!
//! What is used of it is stable since libbpf 1.0: functions give an errno as `-errno`, or NULL with `errno` set.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::{PoisonError, RwLock};

use libbpf_sys::{__va_list_tag, libbpf_print_fn_t, libbpf_print_level};

use super::text_at;

/// Room for the verifier's log, as much as kernels before 5.2 take at most: `UINT_MAX >> 8` (kernel/bpf/verifier.c,
/// `bpf_check`). Untouched until something is written.
const LOG_BYTES: usize = (16 << 20) - 1;
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
        let options = libbpf_sys::bpf_object_open_opts {
            sz: size_of::<libbpf_sys::bpf_object_open_opts>() as libbpf_sys::size_t,
            // The name goes before those of maps that are sections. By itself libbpf takes the address of the bytes.
            object_name: c"".as_ptr(),
            kernel_log_level: verbosity as u32,
            ..Default::default()
        };
        // SAFETY: the bytes live as long as the object (`'a`), and the options past the call.
        let object =
            unsafe { libbpf_sys::bpf_object__open_mem(elf.as_ptr().cast(), elf.len() as libbpf_sys::size_t, &options) };
        let Some(object) = NonNull::new(object) else { return Err(io::Error::last_os_error()) };
        let mut object = Self { object, log: vec![0; LOG_BYTES], file: PhantomData };
        object.keep_log()?;
        Ok(object)
    }

    /// Has the verifier write into our log. Not as an option of the object: the kernel would also write there what it thinks
    /// of type information, and libbpf go on without that.
    fn keep_log(&mut self) -> io::Result<()> {
        let (start, length) = (self.log.as_mut_ptr().cast::<c_char>(), self.log.len() as libbpf_sys::size_t);
        for program in self.programs() {
            // SAFETY: the program is the object's, which is open; the log is on the heap, where it stays until the object is
            // closed, and is read between loads alone. Programs are loaded one after the other.
            check(unsafe { libbpf_sys::bpf_program__set_log_buf(program.program.as_ptr(), start, length) })?;
        }
        Ok(())
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
    HEARD.set(Some(Vec::new()));
    let _listening = Listening;
    set_print();
    let done = work();
    (done, HEARD.take().unwrap_or_default())
}

/// Ends with what was heard, also where the work panics.
struct Listening;

impl Drop for Listening {
    fn drop(&mut self) {
        HEARD.set(None);
    }
}

/// Sets our function, and notes whose was there.
fn set_print() {
    let ours: libbpf_print_fn_t = Some(print);
    // Whoever is called from here on waits until it is known where to hand messages on.
    let mut known = BEFORE.write().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: the function lives as long as the process, and has the type that libbpf asks for.
    let before = unsafe { libbpf_sys::libbpf_set_print(ours) };
    if before.is_none_or(|before| !ptr::fn_addr_eq(before, print as Print)) {
        *known = before;
    }
}

type Print = unsafe extern "C" fn(libbpf_print_level, *const c_char, *mut __va_list_tag) -> c_int;

thread_local! {
    /// What was said to this thread, while it wants to know.
    static HEARD: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
    /// This thread hands a message on, so that functions that hand on to each other end.
    static HANDS_ON: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// The function that was set before ours.
static BEFORE: RwLock<Option<Print>> = RwLock::new(None);

unsafe extern "C" {
    /// printf(3). A `va_list` that is an argument is passed by reference on x86-64 and AArch64, and is a pointer on others.
    fn vsnprintf(buffer: *mut c_char, size: usize, format: *const c_char, arguments: *mut __va_list_tag) -> c_int;
}

/// # Safety
/// As libbpf calls it: the format is a text, and the arguments are those that it asks for.
unsafe extern "C" fn print(level: libbpf_print_level, format: *const c_char, arguments: *mut __va_list_tag) -> c_int {
    let listens = HEARD.try_with(|heard| heard.borrow().is_some()).unwrap_or(false);
    if !listens {
        let before = *BEFORE.read().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = before else { return 0 };
        if HANDS_ON.replace(true) {
            return 0;
        }
        // SAFETY: `libbpf_set_print` gave this function, which libbpf would call so, as it called us.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_hearing() {
        let work = || hear(|| panic!("on purpose"));
        assert!(std::panic::catch_unwind(work).is_err());
        HEARD.with_borrow(|heard| assert_eq!(*heard, None));
    }
}
