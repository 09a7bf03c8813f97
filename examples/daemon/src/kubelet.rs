//! Pools of virtual functions as resources of Kubernetes: what [`dcenet_sriov::kubelet`] does, for each resource of the
//! configuration.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_ebpf::attach::Scrubber;
use dcenet_sriov::kubelet::{DevicePlugin, KubeletError, Look, Resource};
use dcenet_sriov::source::{Machine, SourceConfig};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, KubeletConfig, ResourceConfig};
use crate::threads::Threads;

/// How long after a failure it is begun anew.
const AGAIN: Duration = Duration::from_secs(5);
/// What fails after so long has been well before: longer than any look or kubelet takes to fail at once.
const WELL: Duration = Duration::from_secs(60);

/// A thread that tells the kubelet until it is dropped, and then takes the sockets away.
#[derive(Debug)]
pub struct Telling {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Telling {
    /// Begins, on the host whose namespace the calling thread is in. What cannot be done now is told in the log and tried
    /// again: a node without its functions has pods all the same.
    ///
    /// # Errors
    /// Where there can be no thread, or a resource has a name that no kubelet takes.
    pub fn start(
        config: &Config,
        section: &KubeletConfig,
        threads: &Threads,
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let pools = config.sriov.clone().unwrap_or_default();
        let plugin = |resource| plugin(resource, &pools, &config.state_dir);
        let plugins = section.resources.iter().map(plugin).collect::<Result<Vec<_>, _>>()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = watch::channel(false);
        let directory = section.directory.clone();
        let work = move || {
            runtime.block_on(async move {
                let mut all = JoinSet::new();
                for (name, plugin) in plugins {
                    all.spawn(serve(name, plugin, directory.clone(), stopped.clone()));
                }
                while all.join_next().await.is_some() {}
            });
            // Whoever looks at a function that does not answer is not waited for.
            runtime.shutdown_background();
        };
        Ok(Self { stop, thread: Some(threads.spawn("dcenetd-kubelet", work)?) })
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that tells the kubelet panicked");
        }
    }
}

fn plugin(resource: &ResourceConfig, pools: &Value, state: &Path) -> Result<(String, DevicePlugin), KubeletError> {
    let (pools, pool, state) = (pools.clone(), resource.pool.clone(), state.to_owned());
    let opened: OnceLock<Machine> = OnceLock::new();
    let look: Arc<Look> = Arc::new(move || {
        let machine = match opened.get() {
            Some(machine) => machine,
            None => {
                let machine = Machine::of_this_thread(&state, Some(Arc::new(Scrubber)))?;
                opened.get_or_init(|| machine)
            }
        };
        // A file of pools may have changed.
        Resource::of_pool(machine, &SourceConfig::read(&pools)?.pools()?, &pool)
    });
    Ok((resource.name.clone(), DevicePlugin::new(&resource.name, look)?.with_shape(resource.shape)))
}

async fn serve(name: String, plugin: DevicePlugin, directory: PathBuf, stopped: watch::Receiver<bool>) {
    let mut told = String::new();
    loop {
        let mut stop = stopped.clone();
        let stop = async move {
            // An error is the end of who would tell.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        let begun = Instant::now();
        let Err(error) = plugin.serve(&directory, stop).await else { return };
        let error = error.to_string();
        if error != told || begun.elapsed() >= WELL {
            tracing::error!(resource = name, error, "the kubelet is not told; it is tried again");
            told = error;
        }
        let mut stop = stopped.clone();
        if tokio::time::timeout(AGAIN, stop.wait_for(|stop| *stop)).await.is_ok() {
            return;
        }
    }
}
