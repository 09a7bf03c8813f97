//! The device plugin against a kubelet that the test plays over real sockets, with messages of its own.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dcenet_sriov::inventory::Inventory;
use dcenet_sriov::kubelet::{DIRECTORY, DevicePlugin, KubeletError, Look, Resource};
use dcenet_sriov::test_support::kubelet::{
    Client, Container, Device, File, Kubelet, Node, Nodes, Nothing, Options, next,
};
use dcenet_sriov::test_support::{Port, Tree, VfOf};
use dcenet_sriov::{PciAddress, allocate::Shape};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::{Code, Status};

const SOON: Duration = Duration::from_secs(20);

/// A plugin that runs.
struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), KubeletError>>,
}

impl Running {
    fn start(plugin: &DevicePlugin, directory: &Path) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (plugin, directory) = (plugin.clone(), directory.to_owned());
        let task = tokio::spawn(async move { plugin.serve(&directory, async { stopped.await.unwrap() }).await });
        Self { stop, task }
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        timeout(SOON, self.task).await.unwrap().unwrap().unwrap();
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// Two ports with three functions each: of the first the kernel's with RDMA on node 1, of the second for user space on none.
fn resource(root: &Path) -> Resource {
    let mut tree = Tree::new(root);
    tree.port(&Port { vfs: 3, ..Port::mlx5("0000:81:00.0", "ens1") });
    tree.port(&Port { vfs: 3, vf: VfOf::UserSpace("vfio-pci"), ..Port::igb("0000:01:00.0", "ens2") });
    let inventory = Inventory::scan(&tree.sysfs()).unwrap();
    let members = inventory.vfs().map(|(_, vf)| vf.address).collect();
    Resource { inventory, members, ..Resource::default() }
}

const RDMA: [&str; 3] = ["0000:81:00.2", "0000:81:00.3", "0000:81:00.4"];
const VFIO: [&str; 3] = ["0000:01:10.0", "0000:01:10.2", "0000:01:10.4"];

/// What is there, which tests change.
type Shared = Arc<Mutex<Resource>>;

fn plugin(resource: &Shared) -> DevicePlugin {
    let shared = Arc::clone(resource);
    let look: Arc<Look> = Arc::new(move || Ok(shared.lock().unwrap().clone()));
    DevicePlugin::new("example.com/vf-fast", look).unwrap().every(Duration::from_millis(20))
}

#[test]
fn a_kubelet_hears_of_functions_and_allots_them() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let sockets = directory.path().join("plugins");
        std::fs::create_dir(&sockets).unwrap();
        let resource = Arc::new(Mutex::new(resource(&directory.path().join("sys"))));
        let mut kubelet = Kubelet::start(&sockets, Ok(()));
        let running = Running::start(&plugin(&resource), &sockets);

        let options = Some(Options { pre_start_required: false, preferred: true });
        let register = kubelet.next().await;
        assert_eq!((register.version.as_str(), register.resource_name.as_str()), ("v1beta1", "example.com/vf-fast"));
        assert_eq!(register.options, options);
        let socket: PathBuf = sockets.join(register.endpoint);
        assert_eq!(mode(&socket), 0o600);
        let mut client = Client::of(&socket).await;
        let told: Options = client.ask("/v1beta1.DevicePlugin/GetDevicePluginOptions", Nothing {}).await.unwrap();
        assert_eq!(Some(told), options);

        let mut list = client.watch().await;
        let device = |id: &str, health: &str, node: Option<i64>| Device {
            id: id.to_owned(),
            health: health.to_owned(),
            topology: node.map(|id| Nodes { nodes: vec![Node { id }] }),
        };
        let mut expected: Vec<_> = VFIO.iter().map(|id| device(id, "Healthy", None)).collect();
        expected.extend(RDMA.iter().map(|id| device(id, "Healthy", Some(1))));
        assert_eq!(next(&mut list).await, expected);
        resource.lock().unwrap().ailing.insert(address(RDMA[1]));
        expected[4].health = "Unhealthy".into();
        assert_eq!(next(&mut list).await, expected);
        let refused = client.allocate(&[&[RDMA[1]]]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        {
            // At once, for whoever looks in between is told of that.
            let mut resource = resource.lock().unwrap();
            resource.ailing.clear();
            resource.members.retain(|a| *a != address(VFIO[2]));
        }
        assert_eq!(
            next(&mut list).await.iter().map(|d| d.id.as_str()).collect::<Vec<_>>(),
            [&VFIO[..2], &RDMA].concat()
        );

        let given = client.allocate(&[&[RDMA[2], RDMA[0]], &[VFIO[1]]]).await.unwrap();
        let variable = |ids: &str| HashMap::from([("PCIDEVICE_EXAMPLE_COM_VF_FAST".to_owned(), ids.to_owned())]);
        assert_eq!(given[0].envs, variable("0000:81:00.4,0000:81:00.2"));
        assert_eq!(given[1].envs, variable("0000:01:10.2"));
        let files = |c: &Container| {
            let plain = |f: &File| {
                assert_eq!((&f.inside, f.permissions.as_str()), (&f.outside, "rw"));
                f.outside.clone()
            };
            c.devices.iter().map(plain).collect::<Vec<_>>()
        };
        let rdma = files(&given[0]);
        assert!(rdma.contains(&"/dev/infiniband/rdma_cm".to_owned()), "{rdma:?}");
        assert_eq!(rdma.iter().filter(|f| f.starts_with("/dev/infiniband/uverbs")).count(), 2, "{rdma:?}");
        let vfio = files(&given[1]);
        assert_eq!((vfio.len(), vfio[1].as_str()), (2, "/dev/vfio/vfio"), "{vfio:?}");
        assert!(vfio[0].strip_prefix("/dev/vfio/").unwrap().parse::<u32>().is_ok(), "{vfio:?}");
        let gone = client.allocate(&[&[VFIO[2]]]).await.unwrap_err();
        assert_eq!((gone.code(), gone.message()), (Code::NotFound, "0000:01:10.4: no function of this resource"));

        running.end().await;
        assert!(!socket.exists());
    });
}

#[test]
fn the_functions_that_go_together_are_preferred() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let resource = Arc::new(Mutex::new(resource(&directory.path().join("sys"))));
        let all = [VFIO, RDMA].concat();
        for (shape, must, size, expected) in [
            (Shape::Lowest, &[][..], 2, &[VFIO[0], VFIO[1]][..]),
            (Shape::Distinct, &[], 2, &[VFIO[0], RDMA[0]]),
            (Shape::Spread, &[VFIO[1]], 2, &[VFIO[1], RDMA[0]]),
            (Shape::Distinct, &[VFIO[2]], 2, &[VFIO[2], RDMA[0]]),
            (Shape::Pack, &[RDMA[2]], 3, &RDMA),
            (Shape::Pack, &[RDMA[2]], 4, &[VFIO[0], RDMA[0], RDMA[1], RDMA[2]]),
            (Shape::Lowest, &[RDMA[2]], 1, &[RDMA[2]]),
        ] {
            let sockets = tempfile::tempdir().unwrap();
            let mut kubelet = Kubelet::start(sockets.path(), Ok(()));
            let running = Running::start(&plugin(&resource).with_shape(shape), sockets.path());
            let mut client = Client::of(&sockets.path().join(kubelet.next().await.endpoint)).await;
            assert_eq!(client.prefer(&all, must, size).await.unwrap(), expected, "{shape:?} {must:?}");
            // A kubelet refuses the pod when it gets an error: it is told what there is, and fills up itself.
            assert_eq!(client.prefer(&[VFIO[0], "0000:ff:00.0"], &["lo"], 2).await.unwrap(), [VFIO[0]]);
            assert_eq!(client.prefer(&VFIO, &[], 2).await.unwrap(), VFIO[..2], "{shape:?} of one port");
            running.end().await;
        }
    });
}

#[test]
fn a_kubelet_that_starts_anew_is_told_again() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let sockets = directory.path().join("plugins");
        std::fs::create_dir(&sockets).unwrap();
        let resource = Arc::new(Mutex::new(resource(&directory.path().join("sys"))));
        // What a plugin that was killed has left, and no kubelet yet.
        drop(std::os::unix::net::UnixListener::bind(sockets.join("example.com_vf-fast.sock")).unwrap());
        let running = Running::start(&plugin(&resource), &sockets);
        for _ in 0..2 {
            let mut kubelet = Kubelet::start(&sockets, Ok(()));
            let register = kubelet.next().await;
            let mut client = Client::of(&sockets.join(register.endpoint)).await;
            assert_eq!(next(&mut client.watch().await).await.len(), 6);
            let mut list = client.watch().await;
            next(&mut list).await;
            // Who follows the list is told once, whatever else of the socket changes.
            let socket = sockets.join("example.com_vf-fast.sock");
            std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
            tokio::time::sleep(Duration::from_millis(2500)).await;
            assert!(kubelet.hears_nobody());
        }
        // Another plugin of the same resource is not let near.
        let mut kubelet = Kubelet::start(&sockets, Ok(()));
        kubelet.next().await;
        // Nobody follows the list.
        kubelet.next().await;
        let second = plugin(&resource);
        let second = second.serve(&sockets, std::future::pending());
        let error = timeout(SOON, second).await.unwrap().unwrap_err();
        assert!(matches!(error, KubeletError::Served(_)), "{error}");
        running.end().await;
        assert_eq!(std::fs::read_dir(&sockets).unwrap().count(), 1);
    });
}

#[test]
fn what_a_kubelet_refuses_is_told_and_what_it_cannot_yet_is_asked_again() {
    runtime().block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let sockets = directory.path().join("plugins");
        std::fs::create_dir(&sockets).unwrap();
        let resource = Arc::new(Mutex::new(resource(&directory.path().join("sys"))));
        let said = "the ResourceName \"example.com/vf-fast\" is invalid";
        let mut kubelet = Kubelet::start(&sockets, Err(Status::unknown(said)));
        let running = Running::start(&plugin(&resource), &sockets);
        kubelet.next().await;
        let error = timeout(SOON, running.task).await.unwrap().unwrap().unwrap_err().to_string();
        assert_eq!(error, format!("the kubelet refuses resource example.com/vf-fast: {said}"));

        let mut kubelet = Kubelet::start(&sockets, Err(Status::unavailable("starting")));
        let running = Running::start(&plugin(&resource), &sockets);
        assert_eq!(kubelet.next().await, kubelet.next().await);
        running.end().await;

        let look: Arc<Look> = Arc::new(|| Err(io::Error::other("no tree").into()));
        let blind = DevicePlugin::new("example.com/vf", look).unwrap();
        let error = blind.serve(&sockets, std::future::pending()).await.unwrap_err().to_string();
        assert_eq!(error, "the functions cannot be listed: no tree");
    });
}

#[test]
fn who_looks_for_ever_the_first_time_can_be_ended() {
    // It ends when the look has, also where the test fails: the sender goes before it.
    let runtime = runtime();
    let (begun, begins) = std::sync::mpsc::channel();
    let (answer, asked) = std::sync::mpsc::channel::<()>();
    let asked = Mutex::new(asked);
    runtime.block_on(async {
        let directory = tempfile::tempdir().unwrap();
        let look: Arc<Look> = Arc::new(move || {
            begun.send(()).unwrap();
            // Until the test is over.
            let _ = asked.lock().unwrap().recv();
            Ok(Resource::default())
        });
        let running = Running::start(&DevicePlugin::new("example.com/vf", look).unwrap(), directory.path());
        tokio::task::spawn_blocking(move || begins.recv_timeout(SOON).unwrap()).await.unwrap();
        running.end().await;
    });
    drop(answer);
}

#[test]
fn long_names_fit_into_the_path_of_a_socket() {
    let socket = |name: &str| {
        let look: Arc<Look> = Arc::new(|| Ok(Resource::default()));
        DevicePlugin::new(name, look).unwrap().socket()
    };
    assert_eq!(socket("example.com/vf"), "example.com_vf.sock");
    let domain = format!("{}.example.com", "networks".repeat(7));
    let long = [format!("{domain}/fast"), format!("{domain}/slow")].map(|name| socket(&name));
    assert_ne!(long[0], long[1]);
    for socket in long {
        assert!(Path::new(DIRECTORY).join(&socket).as_os_str().len() <= 107, "{socket}");
    }
}

#[test]
fn a_name_that_no_kubelet_takes_is_refused() {
    for (name, told) in [
        ("vf", "without a domain"),
        ("/vf", "domain is none of DNS"),
        ("Example.com/vf", "domain is none of DNS"),
        ("example..com/vf", "domain is none of DNS"),
        ("example.com/", "not up to 63"),
        ("example.com/a/b", "not up to 63"),
        ("example.com/-a", "not up to 63"),
        ("kubernetes.io/vf", "Kubernetes' own"),
        ("net.kubernetes.io/vf", "Kubernetes' own"),
        ("mykubernetes.io/vf", "Kubernetes' own"),
        ("requests.example.com/vf", "Kubernetes' own"),
    ] {
        let look: Arc<Look> = Arc::new(|| Ok(Resource::default()));
        let error = DevicePlugin::new(name, look).err().unwrap().to_string();
        assert!(error.starts_with("resource: ") && error.contains(told), "{name}: {error}");
    }
}

fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}
