//! Programs on real devices: in force before the device is up, replaced under load, outliving their process, removed
//! without a trace.

mod cgroup;
mod clsact;
mod netkit;
mod tcx;
mod xdp;

use std::ffi::{OsStr, OsString};
use std::ops::Deref;
use std::path::Path;

use dcenet_core::test_support::TestNetNs;
use dcenet_ebpf::attach::Attacher;
use dcenet_ebpf::attach::conformance::{PairKind, Subject};
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::object::ProgramKind;
use dcenet_ebpf::pin::Pins;
use tempfile::TempDir;

/// For each backend: its name, a `Scene` in the module of that name, and what it needs. Each test of the suite by itself, so
/// that one says what fails.
macro_rules! conforms {
    ($ready:ident: $($test:ident),+ $(,)?) => {
        $(#[test]
        fn $test() {
            if $ready() {
                let scene = Scene::new();
                dcenet_ebpf::attach::conformance::$test(&scene.subject());
            }
        })+

        /// This test's own binary, as another process.
        fn child(scene: &Scene) -> std::process::Command {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let name = concat!(module_path!(), "::attaches_and_waits").split_once("::").unwrap().1;
            child.args(["--exact", name, "--ignored", "--nocapture"]).env(PLACE, scene.place());
            child
        }

        #[test]
        fn outlives_its_process() {
            if $ready() {
                let scene = Scene::new();
                dcenet_ebpf::attach::conformance::outlives_its_process(&scene.subject(), &mut child(&scene));
            }
        }

        #[test]
        fn survives_kills() {
            if $ready() {
                let scene = Scene::new();
                let kills = dcenet_ebpf::attach::conformance::survives_kills(&scene.subject(), || child(&scene));
                println!("killed {kills} times");
                assert!(kills >= 20, "{kills}");
            }
        }

        #[test]
        #[ignore = "the child of another test"]
        fn attaches_and_waits() {
            let Some(place) = std::env::var_os(PLACE) else { return };
            let attacher = attacher(std::path::Path::new(&place));
            dcenet_ebpf::attach::conformance::child(&attacher, &dcenet_ebpf::loader::AyaLoader, TAKES);
        }
    };
    ($ready:ident) => {
        conforms!($ready:
            the_device_is_left_as_it_was,
            what_others_have_attached_stays,
            a_replacement_at_the_same_time_is_not_ahead_of_ours,
            an_index_means_the_device_in_the_callers_namespace,
            unfit_requests_are_told_apart,
            what_is_attached_goes_with_its_device,
            a_repeated_call_mends_a_failed_one,
            nothing_passes_before_the_device_is_up,
            the_other_way_is_denied_from_the_start_too,
            nothing_leaks_and_nothing_is_lost_while_replaced,
            survives_faults,
        );
    };
}
use conforms;

/// Tells a child where the backend keeps what it has.
const PLACE: &str = "DCENET_TEST_PLACE";

/// A backend that keeps pins.
trait Pinning: Attacher + Sized {
    /// What it is tried on.
    const PAIR: PairKind = PairKind::Veth;
    /// What it takes.
    const TAKES: ProgramKind = ProgramKind::Classifier;

    /// One that keeps them here.
    fn pinning(pins: Pins) -> Self;

    /// What others see of it on the device `h0`, beside what iproute2 does.
    fn seen(host: &TestNetNs) -> String;
}

/// Such a backend with pins of its own.
struct PinScene<A> {
    attacher: A,
    pins: TestPins,
    state: Box<dyn Fn(&TestNetNs) -> String + Sync>,
}

impl<A: Pinning> PinScene<A> {
    fn new() -> Self {
        Self::with(A::pinning)
    }

    fn with(attacher: impl FnOnce(Pins) -> A) -> Self {
        let pins = TestPins::new();
        let directory = pins.directory().to_owned();
        let state = Box::new(move |host: &TestNetNs| {
            format!("{}{}{:?}", clsact::state(host), A::seen(host), TestPins::files(&directory))
        });
        Self { attacher: attacher(pins.clone()), pins, state }
    }

    fn subject(&self) -> Subject<'_> {
        Subject { attacher: &self.attacher, loader: &AyaLoader, state: &*self.state, pair: A::PAIR, takes: A::TAKES }
    }

    fn place(&self) -> &OsStr {
        self.pins.directory().as_os_str()
    }
}

/// A bpffs of a test's own, which goes with it, also when it fails.
struct TestPins {
    pins: Pins,
    _directory: TempDir,
}

impl TestPins {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { pins: Pins::open(directory.path().join("bpf")).unwrap(), _directory: directory }
    }

    /// The names of the files in it, as the directory has them.
    fn files(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = std::fs::read_dir(directory).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        names
    }
}

impl Deref for TestPins {
    type Target = Pins;

    fn deref(&self) -> &Pins {
        &self.pins
    }
}

impl Drop for TestPins {
    fn drop(&mut self) {
        if let Err(error) = self.pins.clone().unmount() {
            eprintln!("{error}");
        }
    }
}
