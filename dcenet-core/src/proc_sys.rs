//! Settings of the calling thread's network namespace: the files below `/proc/sys/net`.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where a setting is, such as `ipv4/ip_forward`.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(name)
}

/// What a setting is, without the end of its line.
pub(crate) fn read(name: &str) -> io::Result<String> {
    Ok(std::fs::read_to_string(path(name))?.trim().to_owned())
}

/// Makes a setting that.
pub(crate) fn write(name: &str, value: &str) -> io::Result<()> {
    // An empty list is written as a line.
    OpenOptions::new().write(true).open(path(name))?.write_all(format!("{value}\n").as_bytes())
}
