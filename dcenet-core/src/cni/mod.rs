//! The Container Network Interface, plugin side: environment, configuration, verbs, results and errors.
//!
//! Written against CNI specification 1.1.0; versions 0.3.1, 0.4.0, 1.0.0 and 1.1.0 are served, and a result is put
//! into the form of the version that the configuration names. Nothing outside this module knows these formats.
//!
//! A plugin binary calls [`serve`] and brings its [`Backends`]:
//!
//! ```text
//! environment, stdin -> Invocation, NetConf -> Backends -> verb -> result or error on stdout, exit code
//! ```

mod chained;
mod config;
mod delegate;
mod device;
mod environment;
mod error;
mod ipam;
pub mod networks;
#[cfg(feature = "node")]
#[cfg_attr(docsrs, doc(cfg(feature = "node")))]
pub mod node;
mod ranges;
mod result;
mod serve;
mod verbs;
mod version;

pub use config::{Asked, NetConf, Role, RuntimeConfig};
pub use delegate::{Chain, DelegateError, PluginAddresses, PluginCall, PluginName, Plugins, Progress};
pub use environment::{CniArgs, Invocation, TraceParent, Verb};
pub use error::{CniError, ErrorCode};
pub use result::{CniResult, Interface, Ip, Route};
pub use serve::{Backends, PolicyChoice, serve};
pub use version::SpecVersion;
