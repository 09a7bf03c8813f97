//! The plugin's socket, and the kubelet's.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{self, MissedTickBehavior};
use tokio_stream::wrappers::WatchStream;
use tokio_stream::{Stream, StreamExt};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

use super::{DevicePlugin, KubeletError, Resource, api};

/// How long the kubelet may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often sockets are looked at.
const WATCH: Duration = Duration::from_secs(1);
/// How long a kubelet that has taken the plugin may leave its list alone.
const FOLLOWED: Duration = Duration::from_secs(5);
const KUBELET: &str = "kubelet.sock";

/// A socket file, told apart from another of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    /// A file system may give the number of a file that is gone to the next one at once. Other changes of it are told by the
    /// same time, so that it says nothing of the own one, whose number is nobody else's while it is bound.
    changed: (i64, i64),
}

impl Identity {
    fn of(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok().filter(|found| found.file_type().is_socket())?;
        Some(Self { device: found.dev(), inode: found.ino(), changed: (found.ctime(), found.ctime_nsec()) })
    }

    fn is_same_file(self, other: Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

pub(super) async fn serve(
    plugin: &DevicePlugin,
    directory: &Path,
    stop: impl Future<Output = ()>,
) -> Result<(), KubeletError> {
    let mut stop = pin!(stop);
    let own = directory.join(plugin.socket());
    let kubelet = directory.join(KUBELET);
    let resource = tokio::select! {
        () = &mut stop => return Ok(()),
        found = look(plugin) => found.map_err(KubeletError::Look)?,
    };
    let (sender, receiver) = watch::channel(Arc::new(resource));
    let followers = Arc::new(AtomicUsize::new(0));
    let answers = Answers { plugin: Arc::new(plugin.clone()), resource: receiver, followers: Arc::clone(&followers) };
    let mut looks = time::interval(plugin.interval);
    let mut watches = time::interval(WATCH);
    for ticks in [&mut looks, &mut watches] {
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    // The first look has been.
    looks.tick().await;
    let mut listening: Option<Listening> = None;
    // Which kubelet, and since when.
    let mut known_to: Option<(Identity, Instant)> = None;
    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
            _ = looks.tick() => {
                let found = tokio::select! {
                    () = &mut stop => return Ok(()),
                    found = look(plugin) => found,
                };
                match found {
                    Ok(found) => {
                        sender.send_if_modified(|resource| {
                            let differs = **resource != found;
                            if differs {
                                *resource = Arc::new(found);
                            }
                            differs
                        });
                    }
                    Err(error) => tracing::warn!(resource = plugin.name, %error, "the functions cannot be listed"),
                }
            }
            _ = watches.tick() => {
                let Some(there) = Identity::of(&kubelet) else { continue };
                let own_now = Identity::of(&own);
                if !listening.as_ref().is_some_and(|l| own_now.is_some_and(|now| now.is_same_file(l.identity))) {
                    // What is left of its connections ends first: a kubelet takes their end for the end of the plugin.
                    listening = None;
                    known_to = None;
                    match Listening::at(&own, answers.clone()).await {
                        Ok(made) => listening = Some(made),
                        // A kubelet that has just started removes what it finds.
                        Err(KubeletError::Socket { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
                        Err(error) => return Err(error),
                    }
                }
                let is_followed = followers.load(Ordering::Relaxed) > 0;
                let is_known = known_to.is_some_and(|(known, since)| {
                    known == there && (is_followed || since.elapsed() < FOLLOWED)
                });
                if is_known {
                    continue;
                }
                let registered = tokio::select! {
                    () = &mut stop => return Ok(()),
                    registered = register(plugin, &kubelet) => registered,
                };
                match registered {
                    Ok(()) => {
                        if known_to.is_none_or(|(known, _)| known != there) {
                            tracing::info!(resource = plugin.name, "the kubelet has taken it");
                        }
                        known_to = Some((there, Instant::now()));
                    }
                    Err(status) if is_final(&status) => {
                        let reason = status.message().to_owned();
                        return Err(KubeletError::Refused { name: plugin.name.clone(), reason });
                    }
                    Err(status) => {
                        let reason = status.message();
                        tracing::info!(resource = plugin.name, reason, "the kubelet does not take it yet");
                    }
                }
            }
        }
    }
}

async fn look(plugin: &DevicePlugin) -> Result<Resource, Box<dyn std::error::Error + Send + Sync>> {
    let look = Arc::clone(&plugin.look);
    // It reads files.
    tokio::task::spawn_blocking(move || look()).await?
}

/// Whether asking again says the same: the kubelet answers `Unknown` to all that it does not do, and tells what it will never
/// want by words alone (`errUnsupportedVersion` and `errInvalidResourceName` of `pkg/kubelet/cm/devicemanager`).
fn is_final(status: &Status) -> bool {
    let unwanted =
        ["is not supported by kubelet", "the ResourceName"].iter().any(|said| status.message().contains(said));
    matches!(status.code(), Code::Unimplemented | Code::InvalidArgument) || unwanted
}

async fn register(plugin: &DevicePlugin, kubelet: &Path) -> Result<(), Status> {
    let unavailable = |error: &dyn std::error::Error| Status::unavailable(error.to_string());
    let target = format!("unix://{}", kubelet.display());
    let endpoint = Endpoint::from_shared(target).map_err(|e| unavailable(&e))?;
    let channel = time::timeout(PATIENCE, endpoint.connect()).await.map_err(|e| unavailable(&e))?;
    let mut grpc = tonic::client::Grpc::new(channel.map_err(|e| unavailable(&e))?);
    time::timeout(PATIENCE, grpc.ready()).await.map_err(|e| unavailable(&e))?.map_err(|e| unavailable(&e))?;
    let request = api::RegisterRequest {
        version: api::VERSION.to_owned(),
        endpoint: plugin.socket(),
        resource_name: plugin.name.clone(),
        options: Some(OPTIONS),
    };
    let path = http::uri::PathAndQuery::from_static("/v1beta1.Registration/Register");
    let codec = ProstCodec::<api::RegisterRequest, api::Empty>::default();
    // The kubelet calls back before it answers.
    time::timeout(PATIENCE, grpc.unary(Request::new(request), path, codec)).await.map_err(|e| unavailable(&e))??;
    Ok(())
}

const OPTIONS: api::DevicePluginOptions =
    api::DevicePluginOptions { pre_start_required: false, get_preferred_allocation_available: true };

/// The own socket, which goes with it.
struct Listening {
    path: PathBuf,
    identity: Identity,
    connections: tokio::task::JoinHandle<()>,
}

impl Listening {
    async fn at(path: &Path, answers: Answers) -> Result<Self, KubeletError> {
        let failed = |source| KubeletError::Socket { path: path.to_owned(), source };
        if Identity::of(path).is_some() {
            if UnixStream::connect(path).await.is_ok() {
                return Err(KubeletError::Served(path.to_owned()));
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let gone = || failed(io::Error::from(io::ErrorKind::NotFound));
        let identity = Identity::of(path).ok_or_else(gone)?;
        let connections = tokio::spawn(accept(listener, answers));
        Ok(Self { path: path.to_owned(), identity, connections })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.connections.abort();
        if Identity::of(&self.path).is_some_and(|now| now.is_same_file(self.identity)) {
            // Whoever finds it finds nobody there.
            fs::remove_file(&self.path).ok();
        }
    }
}

/// All connections end with the task.
async fn accept(listener: UnixListener, answers: Answers) {
    let mut connections = JoinSet::new();
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection of the kubelet cannot be taken");
                    time::sleep(WATCH).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let answers = answers.clone();
        let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let answers = answers.clone();
            async move { Ok::<_, Infallible>(answers.answer(request).await) }
        });
        connections.spawn(async move {
            let connection = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection of the kubelet has ended");
            }
        });
    }
}

#[derive(Clone)]
struct Answers {
    plugin: Arc<DevicePlugin>,
    resource: watch::Receiver<Arc<Resource>>,
    /// How many follow the list.
    followers: Arc<AtomicUsize>,
}

/// One who follows the list.
struct Follower(Arc<AtomicUsize>);

impl Follower {
    fn of(followers: &Arc<AtomicUsize>) -> Self {
        followers.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(followers))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Answers {
    async fn answer(self, request: http::Request<hyper::body::Incoming>) -> http::Response<Body> {
        match request.uri().path() {
            "/v1beta1.DevicePlugin/GetDevicePluginOptions" => unary(request, |_: api::Empty| Ok(OPTIONS)).await,
            "/v1beta1.DevicePlugin/ListAndWatch" => {
                Grpc::new(ProstCodec::default()).server_streaming(List(self.resource, self.followers), request).await
            }
            "/v1beta1.DevicePlugin/GetPreferredAllocation" => {
                unary(request, |asked: api::PreferredAllocationRequest| {
                    let resource = self.resource();
                    let container_responses = asked.container_requests.iter().map(|container| {
                        let chosen = resource.prefer(&self.plugin, container);
                        api::ContainerPreferredAllocationResponse {
                            ids: chosen.iter().map(ToString::to_string).collect(),
                        }
                    });
                    Ok(api::PreferredAllocationResponse { container_responses: container_responses.collect() })
                })
                .await
            }
            "/v1beta1.DevicePlugin/Allocate" => {
                unary(request, |asked: api::AllocateRequest| {
                    let resource = self.resource();
                    let containers = asked.container_requests.iter();
                    let answers = containers.map(|container| resource.hand_over(&self.plugin, &container.ids));
                    Ok(api::AllocateResponse { container_responses: answers.collect::<Result<_, _>>()? })
                })
                .await
            }
            // Nobody calls it who has read the options.
            "/v1beta1.DevicePlugin/PreStartContainer" => unary(request, |_: api::Empty| Ok(api::Empty {})).await,
            other => Status::unimplemented(format!("{other} is not of v1beta1.DevicePlugin")).into_http(),
        }
    }

    fn resource(&self) -> Arc<Resource> {
        Arc::clone(&self.resource.borrow())
    }
}

async fn unary<Q, A>(
    request: http::Request<hyper::body::Incoming>,
    answer: impl FnMut(Q) -> Result<A, Status>,
) -> http::Response<Body>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + 'static,
{
    Grpc::new(ProstCodec::<A, Q>::default()).unary(Unary(answer), request).await
}

/// A method that is answered at once.
struct Unary<F>(F);

impl<Q, A, F: FnMut(Q) -> Result<A, Status>> UnaryService<Q> for Unary<F> {
    type Response = A;
    type Future = std::future::Ready<Result<Response<A>, Status>>;

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        std::future::ready((self.0)(request.into_inner()).map(Response::new))
    }
}

/// The list, and the list again when it has changed.
struct List(watch::Receiver<Arc<Resource>>, Arc<AtomicUsize>);

impl ServerStreamingService<api::Empty> for List {
    type Response = api::ListAndWatchResponse;
    type ResponseStream = std::pin::Pin<Box<dyn Stream<Item = Result<Self::Response, Status>> + Send>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, _: Request<api::Empty>) -> Self::Future {
        let mut told: Option<Vec<api::Device>> = None;
        let follower = Follower::of(&self.1);
        let lists = WatchStream::new(self.0.clone()).filter_map(move |resource| {
            let _follows = &follower;
            let devices = resource.devices();
            // Not all that is known of a function is told.
            if told.as_ref() == Some(&devices) {
                return None;
            }
            told = Some(devices.clone());
            Some(Ok(api::ListAndWatchResponse { devices }))
        });
        std::future::ready(Ok(Response::new(Box::pin(lists))))
    }
}
