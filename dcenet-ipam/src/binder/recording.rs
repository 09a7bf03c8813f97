//! An outside in a file: for tests of whoever uses a binder, and as a model of a cloud's secondary addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use ipnet::IpNet;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{AddressBinder, BindError, BindRequest, BindToken, Bound, BoundAddress};
use crate::model::Addr;

/// Records what is bound in a file that survives the process, and any number of processes share.
///
/// As clouds do, it takes addresses for a token, up to a limit, and refuses what another token has. Asked without
/// addresses, it hands out those of its subnet.
#[derive(Debug)]
pub struct RecordingBinder {
    path: PathBuf,
    limit: usize,
    subnet: Option<IpNet>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Ledger {
    bound: BTreeMap<IpAddr, Entry>,
    declined: BTreeSet<IpAddr>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    token: BindToken,
    address: IpNet,
}

impl RecordingBinder {
    /// With its record at `path`, whose directory must be there.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), limit: usize::MAX, subnet: None }
    }

    /// Refuses more addresses than that.
    #[must_use]
    pub fn with_limit(self, addresses: usize) -> Self {
        Self { limit: addresses, ..self }
    }

    /// Hands out addresses of the subnet where it is asked for any.
    #[must_use]
    pub fn with_subnet(self, subnet: IpNet) -> Self {
        Self { subnet: Some(subnet), ..self }
    }

    /// What is bound, and for whom.
    ///
    /// # Errors
    /// [`BindError::Failed`] if the file cannot be read.
    pub fn bound(&self) -> Result<BTreeMap<IpAddr, BindToken>, BindError> {
        self.with(|ledger| ledger.bound.iter().map(|(ip, entry)| (*ip, entry.token.clone())).collect())
    }

    fn failed(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> BindError {
        BindError::Failed { outside: self.name(), doing: "keeping the record", source: source.into() }
    }

    /// Changes the record under a lock, all or nothing.
    fn with<R>(&self, change: impl FnOnce(&mut Ledger) -> R) -> Result<R, BindError> {
        let beside = |ending: &str| PathBuf::from(format!("{}{ending}", self.path.display()));
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(beside(".lock"));
        let lock = lock.map_err(|e| self.failed(e))?;
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| self.failed(io::Error::from(e)))?;
        let before = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(self.failed(error)),
        };
        let mut ledger: Ledger = match before.is_empty() {
            true => Ledger::default(),
            false => serde_json::from_slice(&before).map_err(|e| self.failed(e))?,
        };
        let result = change(&mut ledger);
        let after = serde_json::to_vec(&ledger).map_err(|e| self.failed(e))?;
        if after != before {
            self.replace(&beside(".new"), &after).map_err(|e| self.failed(e))?;
        }
        Ok(result)
    }

    fn replace(&self, temporary: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(temporary, &self.path)?;
        let parent = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()
    }

    /// An address of the subnet that is free, not declined, and not the subnet's first, its last or its own.
    fn choose(&self, ledger: &Ledger) -> Option<IpNet> {
        let subnet = self.subnet?;
        let (first, last) = (Addr::from(subnet.network()), Addr::from(subnet.broadcast()));
        // Never more steps than addresses that are taken.
        (first.bits + 1..last.bits).map(|bits| Addr { bits, ..first }.ip()).find_map(|ip| {
            let free = !ledger.bound.contains_key(&ip) && !ledger.declined.contains(&ip);
            if free { IpNet::new(ip, subnet.prefix_len()).ok() } else { None }
        })
    }
}

fn bound_of(request: &BindRequest, addresses: Vec<IpNet>) -> Bound {
    let addresses = addresses.into_iter().map(|address| BoundAddress { address, gateway: None }).collect();
    let (token, mac) = (request.token.clone(), request.mac);
    let (routes, dns, memo) = Default::default();
    Bound { token, addresses, mac, routes, dns, renew: None, until: None, memo }
}

#[async_trait]
impl AddressBinder for RecordingBinder {
    fn name(&self) -> String {
        format!("the record {}", self.path.display())
    }

    async fn bind(&self, request: &BindRequest) -> Result<Bound, BindError> {
        let BindRequest { token, addresses, .. } = request;
        let (outside, exhausted) =
            (self.name(), || BindError::Exhausted { outside: self.name(), token: token.clone() });
        self.with(|ledger| {
            let own: Vec<IpNet> = ledger.bound.values().filter(|e| e.token == *token).map(|e| e.address).collect();
            let fits = addresses.is_empty() || own.iter().all(|a| addresses.contains(a));
            if fits && own.len() == addresses.len().max(1) {
                return Ok(bound_of(request, own));
            }
            let wanted = match addresses.is_empty() {
                true => vec![self.choose(ledger).ok_or_else(exhausted)?],
                false => addresses.clone(),
            };
            for address in &wanted {
                if let Some(entry) = ledger.bound.get(&address.addr())
                    && entry.token != *token
                {
                    let holder = entry.token.clone();
                    return Err(BindError::Held { outside, address: address.addr(), holder });
                }
            }
            if ledger.bound.len() + wanted.len() > self.limit {
                return Err(exhausted());
            }
            for address in &wanted {
                ledger.bound.insert(address.addr(), Entry { token: token.clone(), address: *address });
            }
            Ok(bound_of(request, wanted))
        })?
    }

    async fn renew(&self, bound: &Bound) -> Result<Bound, BindError> {
        let tokens = self.bound()?;
        for a in &bound.addresses {
            if tokens.get(&a.address.addr()) != Some(&bound.token) {
                let (address, token) = (a.address.addr(), bound.token.clone());
                return Err(BindError::Lost { outside: self.name(), address, token });
            }
        }
        Ok(bound.clone())
    }

    async fn release(&self, token: &BindToken, _: Option<&Bound>) -> Result<(), BindError> {
        self.with(|ledger| ledger.bound.retain(|_, entry| entry.token != *token))
    }

    async fn decline(&self, bound: &Bound, address: IpAddr) -> Result<(), BindError> {
        self.with(|ledger| {
            ledger.bound.retain(|_, entry| entry.token != bound.token);
            ledger.declined.insert(address);
        })
    }

    async fn list(&self) -> Result<Option<Vec<BindToken>>, BindError> {
        let mut tokens: Vec<_> = self.bound()?.into_values().collect();
        tokens.sort();
        tokens.dedup();
        Ok(Some(tokens))
    }

    async fn ready(&self) -> Result<(), BindError> {
        self.with(|_| ())
    }
}
