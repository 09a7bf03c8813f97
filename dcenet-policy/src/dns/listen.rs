//! Sockets at which clients ask.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::{set_ip_freebind, set_ipv6_freebind, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

/// Listens at an address, which the host may get later, as a bridge does its own with the first pod. With port 0 both have the same.
pub(super) fn at(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let udp = socket(address, SocketType::DGRAM)?;
    bind(&udp, &address)?;
    let udp = UdpSocket::from(udp);
    let tcp = socket(address, SocketType::STREAM)?;
    // Connections of a proxy before may live for a while.
    set_socket_reuseaddr(&tcp, true)?;
    bind(&tcp, &udp.local_addr()?)?;
    listen(&tcp, BACKLOG)?;
    Ok((udp, TcpListener::from(tcp)))
}

fn socket(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv4() { set_ip_freebind(&socket, true) } else { set_ipv6_freebind(&socket, true) }?;
    Ok(socket)
}

/// Connections that wait to be accepted; the system's own default.
const BACKLOG: i32 = 128;
