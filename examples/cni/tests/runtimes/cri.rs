//! A client of the Container Runtime Interface, version 1 (kubernetes/cri-api, `pkg/apis/runtime/v1/api.proto`): what
//! kubelet says to containerd. Fields that are not used are left out: Protocol Buffers skip what they do not know.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use prost::Message;
use tokio::runtime::{Builder, Runtime};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// How long a call may take on a machine that is busy with much else.
const LIMIT: Duration = Duration::from_secs(180);

#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct PortMapping {
    #[prost(int32, tag = "2")]
    pub container_port: i32,
    #[prost(int32, tag = "3")]
    pub host_port: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
    #[prost(message, repeated, tag = "5")]
    pub port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandbox {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct ListPodSandboxResponse {
    #[prost(message, repeated, tag = "1")]
    items: Vec<PodSandbox>,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

/// A request or an answer that holds nothing but an identifier.
#[derive(Clone, PartialEq, Message)]
struct Identifier {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

#[derive(Clone, PartialEq, Message)]
struct PodIp {
    #[prost(string, tag = "1")]
    ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxNetworkStatus {
    #[prost(string, tag = "1")]
    ip: String,
    #[prost(message, repeated, tag = "2")]
    additional_ips: Vec<PodIp>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatus {
    #[prost(message, optional, tag = "5")]
    network: Option<PodSandboxNetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<PodSandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, repeated, tag = "2")]
    cmd: Vec<String>,
    /// Seconds.
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeCondition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(bool, tag = "2")]
    status: bool,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatusRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
struct ImageStatusResponse {
    /// Only whether it is there.
    #[prost(message, optional, tag = "1")]
    image: Option<Empty>,
}

/// A connection to a runtime.
pub struct Client {
    runtime: Runtime,
    grpc: Grpc<Channel>,
}

impl Client {
    /// Connects to the socket of a runtime.
    pub fn connect(socket: &Path) -> Result<Self, tonic::transport::Error> {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("a path is a URI");
        let channel = runtime.block_on(endpoint.timeout(LIMIT).connect())?;
        Ok(Self { runtime, grpc: Grpc::new(channel) })
    }

    fn call<Q, A>(&mut self, service: &str, method: &str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let path: PathAndQuery = format!("/runtime.v1.{service}/{method}").parse().expect("a path");
        let grpc = &mut self.grpc;
        let answer = self.runtime.block_on(async {
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            grpc.unary(Request::new(request), path, ProstCodec::<Q, A>::default()).await
        });
        Ok(answer?.into_inner())
    }

    fn about<A: Message + Default + 'static>(&mut self, method: &str, id: &str) -> Result<A, Status> {
        self.call("RuntimeService", method, Identifier { id: id.to_owned() })
    }

    /// Whether the runtime and its network are ready.
    pub fn is_ready(&mut self) -> bool {
        let answer: Result<StatusResponse, _> = self.call("RuntimeService", "Status", Empty {});
        let conditions = answer.ok().and_then(|a| a.status).map(|s| s.conditions).unwrap_or_default();
        let holds = |kind: &str| conditions.iter().any(|c| c.kind == kind && c.status);
        holds("RuntimeReady") && holds("NetworkReady")
    }

    /// Whether it knows the image.
    pub fn has_image(&mut self, image: &str) -> bool {
        let image = Some(ImageSpec { image: image.to_owned() });
        let answer: Result<ImageStatusResponse, _> =
            self.call("ImageService", "ImageStatus", ImageStatusRequest { image });
        answer.is_ok_and(|answer| answer.image.is_some())
    }

    /// Makes a pod, and returns its identifier.
    pub fn run_pod(&mut self, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let answer: Identifier = self.call("RuntimeService", "RunPodSandbox", request)?;
        Ok(answer.id)
    }

    /// The identifiers of the pods that it knows.
    pub fn pods(&mut self) -> Result<Vec<String>, Status> {
        let answer: ListPodSandboxResponse = self.call("RuntimeService", "ListPodSandbox", Empty {})?;
        Ok(answer.items.into_iter().map(|pod| pod.id).collect())
    }

    /// The pod's addresses, as the runtime has them from the plugin.
    pub fn addresses(&mut self, pod: &str) -> Result<Vec<String>, Status> {
        let answer: PodSandboxStatusResponse = self.about("PodSandboxStatus", pod)?;
        let network = answer.status.and_then(|s| s.network).unwrap_or_default();
        Ok(std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|a| a.ip)).collect())
    }

    /// Starts a container in the pod, and returns its identifier.
    pub fn start(
        &mut self,
        pod: &str,
        config: &PodSandboxConfig,
        image: &str,
        command: &[&str],
    ) -> Result<String, Status> {
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".to_owned() }),
            image: Some(ImageSpec { image: image.to_owned() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let Identifier { id } = self.call("RuntimeService", "CreateContainer", request)?;
        let Empty {} = self.about("StartContainer", &id)?;
        Ok(id)
    }

    /// Runs a program in a container. Returns what it printed, and fails where it does.
    pub fn exec(&mut self, container: &str, command: &[&str]) -> Result<String, Status> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 120,
        };
        let answer: ExecSyncResponse = self.call("RuntimeService", "ExecSync", request)?;
        let [stdout, stderr] = [answer.stdout, answer.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        match answer.exit_code {
            0 => Ok(stdout),
            code => Err(Status::aborted(format!("{command:?} ends with {code}: {stdout}{stderr}"))),
        }
    }

    /// Ends the pod's containers and takes its network down.
    pub fn stop(&mut self, pod: &str) -> Result<(), Status> {
        let Empty {} = self.about("StopPodSandbox", pod)?;
        Ok(())
    }

    /// Removes what is left of a pod.
    pub fn remove(&mut self, pod: &str) -> Result<(), Status> {
        let Empty {} = self.about("RemovePodSandbox", pod)?;
        Ok(())
    }
}
