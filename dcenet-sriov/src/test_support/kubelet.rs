//! A kubelet that tests play over real sockets, with messages of its own.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Ready;
use std::path::Path;
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// How long anything may take.
const SOON: Duration = Duration::from_secs(20);

/// No fields.
#[derive(Clone, PartialEq, Message)]
pub struct Nothing {}

/// What a plugin tells of itself.
#[derive(Clone, PartialEq, Message)]
pub struct Register {
    /// Which API.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The name of its socket in the kubelet's directory.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// What it has.
    #[prost(string, tag = "3")]
    pub resource_name: String,
    /// See there.
    #[prost(message, optional, tag = "4")]
    pub options: Option<Options>,
}

/// What a plugin can do beside.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// Whether it wants to be told before a container starts.
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    /// Whether it can be asked what goes together.
    #[prost(bool, tag = "2")]
    pub preferred: bool,
}

/// All devices of a resource.
#[derive(Clone, PartialEq, Message)]
pub struct List {
    /// The devices.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// A device.
#[derive(Clone, PartialEq, Message)]
pub struct Device {
    /// Its name, which is an address.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `Healthy` or `Unhealthy`.
    #[prost(string, tag = "2")]
    pub health: String,
    /// Where it is, if it is known.
    #[prost(message, optional, tag = "3")]
    pub topology: Option<Nodes>,
}

/// Where a device is.
#[derive(Clone, PartialEq, Message)]
pub struct Nodes {
    /// The nodes.
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<Node>,
}

/// A NUMA node.
#[derive(Clone, PartialEq, Message)]
pub struct Node {
    /// Its number.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// What would go best together.
#[derive(Clone, PartialEq, Message)]
pub struct Prefer {
    /// One for each container.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<PreferOne>,
}

/// For one container.
#[derive(Clone, PartialEq, Message)]
pub struct PreferOne {
    /// What is left.
    #[prost(string, repeated, tag = "1")]
    pub available: Vec<String>,
    /// What must be among them.
    #[prost(string, repeated, tag = "2")]
    pub must: Vec<String>,
    /// How many.
    #[prost(int32, tag = "3")]
    pub size: i32,
}

/// Lists of addresses, one for each container: what is preferred, and what is asked for.
#[derive(Clone, PartialEq, Message)]
pub struct Lists {
    /// One for each container.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<Ids>,
}

/// Addresses.
#[derive(Clone, PartialEq, Message)]
pub struct Ids {
    /// In order.
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

/// What containers find.
#[derive(Clone, PartialEq, Message)]
pub struct Allocated {
    /// One for each container.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<Container>,
}

/// What a container finds.
#[derive(Clone, PartialEq, Message)]
pub struct Container {
    /// Variables of its environment.
    #[prost(map = "string, string", tag = "1")]
    pub envs: HashMap<String, String>,
    /// None of ours has any.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Nothing>,
    /// Its character devices.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<File>,
    /// None of ours has any.
    #[prost(map = "string, string", tag = "4")]
    pub annotations: HashMap<String, String>,
}

/// A character device.
#[derive(Clone, PartialEq, Message)]
pub struct File {
    /// Its path in the container.
    #[prost(string, tag = "1")]
    pub inside: String,
    /// Its path on the host.
    #[prost(string, tag = "2")]
    pub outside: String,
    /// What may be done with it.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

/// A kubelet that has started. It ends with its socket, as a process that is killed leaves it.
pub struct Kubelet {
    registered: mpsc::UnboundedReceiver<Register>,
    task: JoinHandle<()>,
}

impl Kubelet {
    /// Removes all sockets, and answers `answer` to those who register.
    pub fn start(directory: &Path, answer: Result<(), Status>) -> Self {
        for entry in std::fs::read_dir(directory).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let listener = UnixListener::bind(directory.join("kubelet.sock")).unwrap();
        let (sender, registered) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (sender, answer) = (sender.clone(), answer.clone());
                let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    assert_eq!(request.uri().path(), "/v1beta1.Registration/Register");
                    let method = Registration(sender.clone(), answer.clone());
                    async move {
                        let mut grpc = tonic::server::Grpc::new(ProstCodec::<Nothing, Register>::default());
                        Ok::<_, Infallible>(grpc.unary(method, request).await)
                    }
                });
                tokio::spawn(async move {
                    let builder = http2::Builder::new(TokioExecutor::new());
                    builder.serve_connection(TokioIo::new(stream), service).await.ok();
                });
            }
        });
        Self { registered, task }
    }

    /// Who registers next.
    pub async fn next(&mut self) -> Register {
        timeout(SOON, self.registered.recv()).await.unwrap().unwrap()
    }

    /// Whether nobody has registered beside those who were told.
    pub fn hears_nobody(&mut self) -> bool {
        self.registered.try_recv().is_err()
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Registration(mpsc::UnboundedSender<Register>, Result<(), Status>);

impl tonic::server::UnaryService<Register> for Registration {
    type Response = Nothing;
    type Future = Ready<Result<Response<Nothing>, Status>>;

    fn call(&mut self, request: Request<Register>) -> Self::Future {
        let Self(sender, answer) = self;
        sender.send(request.into_inner()).unwrap();
        std::future::ready(answer.clone().map(|()| Response::new(Nothing {})))
    }
}

/// The kubelet's client of a plugin.
pub struct Client(tonic::client::Grpc<Channel>);

impl Client {
    /// Connects to a plugin.
    pub async fn of(socket: &Path) -> Self {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let mut grpc = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
        grpc.ready().await.unwrap();
        Self(grpc)
    }

    /// Asks by the path of a method.
    pub async fn ask<Q, A>(&mut self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        self.0.ready().await.unwrap();
        let path = http::uri::PathAndQuery::from_static(method);
        let answer = self.0.unary(Request::new(request), path, ProstCodec::<Q, A>::default());
        timeout(SOON, answer).await.unwrap().map(Response::into_inner)
    }

    /// Follows the list.
    pub async fn watch(&mut self) -> Streaming<List> {
        let path = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/ListAndWatch");
        let codec = ProstCodec::<Nothing, List>::default();
        self.0.ready().await.unwrap();
        self.0.server_streaming(Request::new(Nothing {}), path, codec).await.unwrap().into_inner()
    }

    /// What goes best together, for one container.
    pub async fn prefer(&mut self, available: &[&str], must: &[&str], size: i32) -> Result<Vec<String>, Status> {
        let list = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect();
        let one = PreferOne { available: list(available), must: list(must), size };
        let path = "/v1beta1.DevicePlugin/GetPreferredAllocation";
        let lists: Lists = self.ask(path, Prefer { containers: vec![one] }).await?;
        assert_eq!(lists.containers.len(), 1);
        Ok(lists.containers[0].ids.clone())
    }

    /// Allots devices, to one container each.
    pub async fn allocate(&mut self, containers: &[&[&str]]) -> Result<Vec<Container>, Status> {
        let ids = |ids: &&[&str]| Ids { ids: ids.iter().map(|id| (*id).to_owned()).collect() };
        let request = Lists { containers: containers.iter().map(ids).collect() };
        self.ask::<_, Allocated>("/v1beta1.DevicePlugin/Allocate", request).await.map(|a| a.containers)
    }
}

/// The list as it is told next.
pub async fn next(list: &mut Streaming<List>) -> Vec<Device> {
    timeout(SOON, list.message()).await.unwrap().unwrap().unwrap().devices
}
