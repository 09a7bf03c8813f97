//! Calls to the members of a cluster: connections, fail-over, TLS, the password, and what a failure says about whether
//! the call was carried out.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prost::Message;
use tokio::time::{Instant, sleep, timeout};
use tonic::client::Grpc;
use tonic::codec::Streaming;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::EtcdConfig;
use super::wire::{AuthenticateRequest, AuthenticateResponse, method};
use crate::store::StoreError;

/// The members of one cluster, of which one is called until it fails.
pub(super) struct Client {
    members: Vec<Member>,
    current: AtomicUsize,
    /// Its files are read for each connection and for each token, so that a rotation needs no restart.
    config: EtcdConfig,
    token: Mutex<Option<MetadataValue<Ascii>>>,
    /// For one try at one member, the connection included.
    patience: Duration,
}

struct Member {
    /// Without what the files of TLS say.
    endpoint: Endpoint,
    channel: tokio::sync::Mutex<Option<Channel>>,
}

/// Why a try ended without the answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// The revision that it asked for is compacted; it was a read.
    Compacted,
    /// It may have been carried out, or may still be.
    Lost(String),
    /// etcd refused it, and would again.
    Refused(StoreError),
    /// It was not carried out; another try may succeed.
    Unsent(String),
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let members: Vec<String> = self.members.iter().map(|m| m.endpoint.uri().to_string()).collect();
        f.debug_struct("Client").field("members", &members).finish_non_exhaustive()
    }
}

impl Client {
    pub(super) fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        let tls = tls(config)?;
        let patience = config.patience();
        let mut members = Vec::new();
        for (i, text) in config.endpoints.iter().enumerate() {
            let wrong = |reason: &str| {
                StoreError::Misuse(format!(
                    "ipam.store.endpoints[{i}]: {text:?} is not accepted: {reason}; write http://HOST:PORT, or \
                     https://HOST:PORT with ipam.store.ca"
                ))
            };
            let endpoint = Endpoint::from_shared(text.clone()).map_err(|e| wrong(&e.to_string()))?;
            let uri = endpoint.uri();
            if uri.host().is_none_or(str::is_empty) || uri.path() != "/" || uri.query().is_some() {
                return Err(wrong("it is not a host and a port"));
            }
            match (uri.scheme_str(), &tls) {
                (Some("http"), None) => {}
                (Some("http"), Some(_)) => return Err(wrong("certificates are given, and it would not use them")),
                (Some("https"), Some(tls)) => {
                    secured(endpoint.clone(), tls.clone(), config)?;
                }
                (Some("https"), None) => return Err(wrong("no CA certificate is given to know the server by")),
                _ => return Err(wrong("its scheme is neither http nor https")),
            }
            let endpoint = endpoint
                .connect_timeout(patience)
                // etcd cuts off who pings more often than every 5 s (--grpc-keepalive-min-time).
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(5))
                .initial_stream_window_size(WINDOW)
                .initial_connection_window_size(WINDOW);
            members.push(Member { endpoint, channel: tokio::sync::Mutex::default() });
        }
        if members.is_empty() {
            return Err(StoreError::Misuse("ipam.store.endpoints: [] names no member; name at least one".to_owned()));
        }
        // Processes begin at different members.
        let current = AtomicUsize::new(RandomState::new().build_hasher().finish() as usize % members.len());
        user(config)?;
        Ok(Self { members, current, config: config.clone(), token: Mutex::default(), patience })
    }

    /// Calls until there is an answer or the deadline is over. Only for what may be carried out twice.
    pub(super) async fn call<Q, A>(&self, path: &'static str, request: &Q, deadline: Instant) -> Result<A, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let mut tries = 0;
        loop {
            match self.attempt(path, request, deadline).await {
                Err(Failure::Lost(reason) | Failure::Unsent(reason)) => {
                    if !self.pause(&mut tries, deadline).await {
                        return Err(Failure::Refused(StoreError::Unavailable(reason)));
                    }
                }
                other => return other,
            }
        }
    }

    /// Waits a little before another try; false if there is no time for one.
    pub(super) async fn pause(&self, tries: &mut u32, deadline: Instant) -> bool {
        *tries += 1;
        // Other members are tried at once; then all, ever more slowly.
        let round = *tries / self.members.len() as u32;
        if (*tries as usize).is_multiple_of(self.members.len()) {
            sleep(Duration::from_millis(10 << round.min(5)).min(deadline.saturating_duration_since(Instant::now())))
                .await;
        }
        Instant::now() < deadline
    }

    /// One try at the current member. After a failure that is the member's, the next try is at the next.
    pub(super) async fn attempt<Q, A>(&self, path: &'static str, request: &Q, deadline: Instant) -> Result<A, Failure>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        let patience = self.patience.min(deadline.saturating_duration_since(Instant::now()));
        let mut renewed = false;
        loop {
            let (at, mut grpc) = self.connect(patience).await?;
            let token = self.token(&mut grpc, at, patience).await?;
            let mut sent = Request::new(request.clone());
            if let Some(token) = &token {
                sent.metadata_mut().insert("token", token.clone());
            }
            let codec = ProstCodec::<Q, A>::default();
            match timeout(patience, grpc.unary(sent, PathAndQuery::from_static(path), codec)).await {
                Ok(Ok(answer)) => return Ok(answer.into_inner()),
                Ok(Err(status)) if !renewed && self.config.username.is_some() && is_token_fault(&status) => {
                    renewed = true;
                    self.forget_token(token);
                }
                Ok(Err(status)) => return Err(self.failure(at, &status).await),
                Err(_) => {
                    self.leave(at).await;
                    return Err(Failure::Lost(format!("{} gave no answer within {patience:?}", self.name(at))));
                }
            }
        }
    }

    /// Opens a stream in both directions. What comes over it ends with an error where the member has no leader.
    pub(super) async fn stream<Q, A>(
        &self,
        path: &'static str,
        requests: impl tokio_stream::Stream<Item = Q> + Send + 'static,
        deadline: Instant,
    ) -> Result<(usize, Streaming<A>), Failure>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let patience = self.patience.min(deadline.saturating_duration_since(Instant::now()));
        let (at, mut grpc) = self.connect(patience).await?;
        let token = self.token(&mut grpc, at, patience).await?;
        let mut sent = Request::new(requests);
        sent.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &token {
            sent.metadata_mut().insert("token", token.clone());
        }
        let codec = ProstCodec::<Q, A>::default();
        match timeout(patience, grpc.streaming(sent, PathAndQuery::from_static(path), codec)).await {
            Ok(Ok(answer)) => Ok((at, answer.into_inner())),
            Ok(Err(status)) => {
                self.forget_token(token);
                Err(self.failure(at, &status).await)
            }
            Err(_) => {
                self.leave(at).await;
                Err(Failure::Unsent(format!("{} gave no answer within {patience:?}", self.name(at))))
            }
        }
    }

    async fn connect(&self, patience: Duration) -> Result<(usize, Grpc<Channel>), Failure> {
        let at = self.current.load(Ordering::Relaxed) % self.members.len();
        let connected = async {
            let member = &self.members[at];
            let mut slot = member.channel.lock().await;
            let channel = match &*slot {
                Some(channel) => channel.clone(),
                None => {
                    let mut endpoint = member.endpoint.clone();
                    if let Some(tls) = tls(&self.config).map_err(|e| e.to_string())? {
                        endpoint = secured(endpoint, tls, &self.config).map_err(|e| e.to_string())?;
                    }
                    slot.insert(endpoint.connect().await.map_err(|e| causes(&e))?).clone()
                }
            };
            let mut grpc = Grpc::new(channel).max_decoding_message_size(usize::MAX);
            grpc.ready().await.map_err(|e| causes(&e))?;
            Ok(grpc)
        };
        let reason: String = match timeout(patience, connected).await {
            Ok(Ok(grpc)) => return Ok((at, grpc)),
            Ok(Err(reason)) => reason,
            Err(_) => format!("no connection within {patience:?}"),
        };
        self.leave(at).await;
        Err(Failure::Unsent(format!("{}: {reason}", self.name(at))))
    }

    /// The token that stands for the password, where there is one.
    async fn token(
        &self,
        grpc: &mut Grpc<Channel>,
        at: usize,
        patience: Duration,
    ) -> Result<Option<MetadataValue<Ascii>>, Failure> {
        if self.config.username.is_none() {
            return Ok(None);
        }
        if let Some(token) = &*self.token.lock() {
            return Ok(Some(token.clone()));
        }
        // A file that is being replaced is there in a moment.
        let Some(user) = user(&self.config).map_err(|e| Failure::Unsent(e.to_string()))? else { return Ok(None) };
        let codec = ProstCodec::<AuthenticateRequest, AuthenticateResponse>::default();
        let path = PathAndQuery::from_static(method::AUTHENTICATE);
        let answer = match timeout(patience, grpc.unary(Request::new(user.clone()), path, codec)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                return Err(match self.failure(at, &status).await {
                    // Nothing but a token was asked for.
                    Failure::Lost(reason) => Failure::Unsent(reason),
                    Failure::Refused(_) => Failure::Refused(StoreError::Denied(format!(
                        "{}: user {:?} is not let in: {}; see ipam.store.username and ipam.store.passwordFile",
                        self.name(at),
                        user.name,
                        status.message()
                    ))),
                    other => other,
                });
            }
            Err(_) => {
                self.leave(at).await;
                return Err(Failure::Unsent(format!("{} gave no token within {patience:?}", self.name(at))));
            }
        };
        let token = MetadataValue::try_from(answer.token)
            .map_err(|_| Failure::Refused(StoreError::Unavailable("etcd gave a token that is no text".to_owned())))?;
        *self.token.lock() = Some(token.clone());
        // The place in the queue that `connect` took is used up.
        grpc.ready().await.map_err(|error| Failure::Unsent(format!("{}: {}", self.name(at), causes(&error))))?;
        Ok(Some(token))
    }

    /// Forgets a token, unless another call has replaced it.
    fn forget_token(&self, token: Option<MetadataValue<Ascii>>) {
        let mut current = self.token.lock();
        if *current == token {
            *current = None;
        }
    }

    /// What a status says; see etcd's `api/v3rpc/rpctypes/error.go`.
    pub(super) async fn failure(&self, at: usize, status: &Status) -> Failure {
        let text = format!("{}: {} ({:?})", self.name(at), status.message(), status.code());
        match status.code() {
            Code::OutOfRange if status.message().contains("compacted") => Failure::Compacted,
            // Refused before it was proposed to the cluster.
            Code::ResourceExhausted if status.message().contains("too many requests") => Failure::Unsent(text),
            Code::PermissionDenied | Code::Unauthenticated => Failure::Refused(StoreError::Denied(text)),
            Code::InvalidArgument if status.message().contains("user name is empty") => {
                Failure::Refused(StoreError::Denied(format!(
                    "{text}: it asks for a user; name one in ipam.store.username and ipam.store.passwordFile"
                )))
            }
            Code::ResourceExhausted => Failure::Refused(StoreError::Unavailable(text)),
            Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::Unimplemented => {
                Failure::Refused(StoreError::Misuse(text))
            }
            _ => {
                self.leave(at).await;
                Failure::Lost(text)
            }
        }
    }

    /// Why a member has cancelled a watch.
    pub(super) async fn cancelled(&self, at: usize, reason: &str) -> Failure {
        let text = format!("{}: the watch was cancelled: {reason}", self.name(at));
        if reason.contains("ermission") {
            // A token that has expired is refused in the same words.
            *self.token.lock() = None;
            return Failure::Refused(StoreError::Denied(text));
        }
        self.leave(at).await;
        Failure::Unsent(text)
    }

    /// Turns to the next member, and to a new connection should this one be turned to again.
    async fn leave(&self, at: usize) {
        let next = (at + 1) % self.members.len();
        // Only the first of many calls that fail together moves on.
        let _ = self.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
        *self.members[at].channel.lock().await = None;
    }

    fn name(&self, at: usize) -> String {
        self.members[at].endpoint.uri().to_string()
    }
}

fn is_token_fault(status: &Status) -> bool {
    status.code() == Code::Unauthenticated || status.message().contains("revision of auth store is old")
}

/// Who asks for a token, with the password that its file holds now.
fn user(config: &EtcdConfig) -> Result<Option<AuthenticateRequest>, StoreError> {
    match (&config.username, &config.password_file) {
        (Some(name), Some(file)) => {
            let password = read(file, "ipam.store.passwordFile")?;
            let password = password.strip_suffix('\n').unwrap_or(&password).to_owned();
            Ok(Some(AuthenticateRequest { name: name.clone(), password }))
        }
        (None, None) => Ok(None),
        (Some(name), None) => Err(StoreError::Misuse(format!(
            "ipam.store.username: {name:?} has no password; name its file in ipam.store.passwordFile"
        ))),
        (None, Some(file)) => Err(StoreError::Misuse(format!(
            "ipam.store.passwordFile: {:?} is nobody's; name the user in ipam.store.username",
            file.display()
        ))),
    }
}

fn secured(endpoint: Endpoint, tls: ClientTlsConfig, config: &EtcdConfig) -> Result<Endpoint, StoreError> {
    endpoint.tls_config(tls).map_err(|e| StoreError::Misuse(format!("{}: {}", files(config), causes(&e))))
}

/// What the files of TLS hold now.
fn tls(config: &EtcdConfig) -> Result<Option<ClientTlsConfig>, StoreError> {
    let Some(ca) = &config.ca else {
        return match config.cert.as_ref().or(config.key.as_ref()) {
            Some(file) => Err(StoreError::Misuse(format!(
                "ipam.store.cert, ipam.store.key: {:?} is of no use without ipam.store.ca, the certificate by which \
                 the server is known",
                file.display()
            ))),
            None => Ok(None),
        };
    };
    let pem = |file: &Path, field: &str, kind: &str| {
        let text = read(file, field)?;
        if text.lines().any(|l| l.starts_with("-----BEGIN ") && l.trim_end().ends_with(&format!("{kind}-----"))) {
            return Ok(text);
        }
        let what = kind.to_lowercase();
        Err(StoreError::Misuse(format!("{field}: {} holds no {what} in PEM form; name one that does", file.display())))
    };
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem(ca, "ipam.store.ca", "CERTIFICATE")?));
    match (&config.cert, &config.key) {
        (None, None) => Ok(Some(tls)),
        (Some(cert), Some(key)) => Ok(Some(tls.identity(Identity::from_pem(
            pem(cert, "ipam.store.cert", "CERTIFICATE")?,
            pem(key, "ipam.store.key", "PRIVATE KEY")?,
        )))),
        (Some(file), None) | (None, Some(file)) => Err(StoreError::Misuse(format!(
            "ipam.store.cert, ipam.store.key: {:?} stands alone; a certificate needs its key, and a key its certificate",
            file.display()
        ))),
    }
}

fn read(file: &Path, field: &str) -> Result<String, StoreError> {
    std::fs::read_to_string(file)
        .map_err(|source| StoreError::Io { doing: format!("{field}: reading {}", file.display()), source })
}

/// The files of TLS, for an error that may be of any.
fn files(config: &EtcdConfig) -> String {
    let files: Vec<String> =
        [&config.ca, &config.cert, &config.key].into_iter().flatten().map(|f| f.display().to_string()).collect();
    files.join(", ")
}

/// An error with what caused it: the outermost says only "transport error".
fn causes<E: std::error::Error>(error: &E) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Bytes that may be under way to us, so that long listings do not wait for acknowledgements.
const WINDOW: u32 = 1 << 20;
