//! The DNS proxy, from whose answers rules by names learn.

use std::sync::Arc;

use dcenet_policy::dns::{Proxy, ProxyConfig};
use dcenet_policy::enforcer::Learner;
use parking_lot::Mutex;

/// The proxy that runs, if one does.
pub type Running = Arc<Mutex<Option<Proxy>>>;

/// A proxy, or what it takes to start one. It ends with this.
pub struct Names {
    config: ProxyConfig,
    learner: Learner,
    proxy: Running,
    /// Why it could not be started last.
    told: Option<String>,
}

impl Names {
    /// Nothing is started yet.
    pub fn new(config: ProxyConfig, learner: Learner) -> Self {
        Self { config, learner, proxy: Running::default(), told: None }
    }

    /// For who counts what it does.
    pub fn proxy(&self) -> Running {
        Arc::clone(&self.proxy)
    }

    /// Starts what does not run.
    ///
    /// # Errors
    /// Where a proxy has run and does not any more.
    pub fn look(&mut self) -> Result<(), &'static str> {
        let mut running = self.proxy.lock();
        if let Some(proxy) = &*running {
            return if proxy.has_ended() { Err("a thread of the DNS proxy has ended") } else { Ok(()) };
        }
        match Proxy::start(self.config.clone(), Arc::new(self.learner.clone())) {
            Ok(proxy) => {
                tracing::info!(addresses = ?proxy.addresses(), "the DNS proxy listens");
                (*running, self.told) = (Some(proxy), None);
            }
            Err(error) => {
                let error = error.to_string();
                if self.told.as_ref() != Some(&error) {
                    tracing::warn!(error, "dns: tried again every 5 s");
                    self.told = Some(error);
                }
            }
        }
        Ok(())
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        drop(self.proxy.lock().take());
    }
}
