//! A network whose plugins are others: one, or a list of them (CNI 1.1.0, section 1), and their verbs in the order of the
//! specification (section 3, "Lifecycle & Ordering"), as libcni calls them.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{DelegateError, PluginCall, PluginName, Plugins};
use crate::cni::{CniError, ErrorCode, SpecVersion, Verb};
use crate::model::NetworkName;
use crate::section::{self, SectionError};

/// What happens while a network is attached.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// A plugin was started, as the leader of this process group, and has yet to get its configuration.
    Started(u32),
    /// A plugin answered with this result.
    Told(&'a Value),
}

/// The plugins of a network, in the order in which ADD calls them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    name: NetworkName,
    version: SpecVersion,
    plugins: Vec<Map<String, Value>>,
    #[serde(default)]
    disable_check: bool,
    #[serde(default)]
    disable_gc: bool,
}

impl Chain {
    /// Reads a configuration, or a list of them, that stands at `path`. `name` and `version` are taken where it does not
    /// say its own.
    ///
    /// # Errors
    /// Names the wrong field.
    pub fn read(path: &str, value: &Value, name: &NetworkName, version: SpecVersion) -> Result<Self, SectionError> {
        let at = |field: String, reason: String| SectionError { field, reason };
        let Value::Object(keys) = value else {
            return Err(at(path.to_owned(), format!("{value} is not an object; give a CNI configuration or a list")));
        };
        let name = match keys.get("name") {
            None => name.clone(),
            Some(own) => section::read(&format!("{path}.name"), own)?,
        };
        let version = match keys.get("cniVersion") {
            None => version,
            // What is published is often of this version, whose text alone 0.3.1 mends: every plugin of it serves both.
            Some(Value::String(own)) if own == TEXT_MENDED => SpecVersion::V0_3_1,
            Some(Value::String(own)) => {
                own.parse().map_err(|e: CniError| at(format!("{path}.cniVersion"), e.message))?
            }
            Some(other) => return Err(at(format!("{path}.cniVersion"), format!("{other} is not a string"))),
        };
        let flag = |key: &str| match keys.get(key) {
            None => Ok(false),
            // libcni takes the text too.
            Some(Value::String(text)) if text == "true" => Ok(true),
            Some(Value::String(text)) if text == "false" => Ok(false),
            Some(value) => section::read(&format!("{path}.{key}"), value),
        };
        let (disable_check, disable_gc) = (flag("disableCheck")?, flag("disableGC")?);
        let plugins: Vec<Map<String, Value>> = match keys.get("plugins") {
            None => vec![keys.clone()],
            Some(list) => section::read(&format!("{path}.plugins"), list)?,
        };
        if plugins.is_empty() {
            return Err(at(format!("{path}.plugins"), "an empty list attaches nothing; give at least one".to_owned()));
        }
        for (i, plugin) in plugins.iter().enumerate() {
            let path = if keys.contains_key("plugins") { format!("{path}.plugins[{i}]") } else { path.to_owned() };
            plugin_name(plugin).map_err(|reason| at(format!("{path}.type"), reason))?;
        }
        Ok(Self { name, version, plugins, disable_check, disable_gc })
    }

    /// The network's name.
    pub fn name(&self) -> &NetworkName {
        &self.name
    }

    /// The version of the specification that its plugins are spoken to in.
    pub fn version(&self) -> SpecVersion {
        self.version
    }

    /// The one plugin's own configuration, where it is of this type.
    pub(in crate::cni) fn only_of_type(&self, plugin: &str) -> Option<&Map<String, Value>> {
        match &self.plugins[..] {
            [only] if only.get("type").is_some_and(|own| own == plugin) => Some(only),
            _ => None,
        }
    }

    /// Has each of its plugins get these arguments (CNI's CONVENTIONS.md, "args in network config") instead of its own of the
    /// same keys.
    pub(in crate::cni) fn give_args(&mut self, arguments: &Map<String, Value>) {
        if arguments.is_empty() {
            return;
        }
        for plugin in &mut self.plugins {
            let args = plugin.entry("args").or_insert(Value::Null);
            // Other namespaces of it are the plugin's own.
            if !args.is_object() {
                *args = json!({});
            }
            if !args["cni"].is_object() {
                args["cni"] = json!({});
            }
            args["cni"].as_object_mut().into_iter().for_each(|cni| cni.extend(arguments.clone()));
        }
    }

    /// The same without arguments: those that a pod was given are of no other one.
    pub(in crate::cni) fn without_args(&self) -> Self {
        let mut bare = self.clone();
        for args in bare.plugins.iter_mut().filter_map(|plugin| plugin.get_mut("args")?.as_object_mut()) {
            args.remove("cni");
        }
        for plugin in &mut bare.plugins {
            if plugin.get("args").and_then(Value::as_object).is_some_and(Map::is_empty) {
                plugin.remove("args");
            }
        }
        bare
    }

    /// Whether any of its plugins has its addresses from this program, or is it.
    pub(in crate::cni) fn asks_us(&self) -> bool {
        let ours = |name: Option<&Value>| name.is_some_and(|name| name == "dcenet");
        let asks = |plugin: &Map<String, Value>| {
            ours(plugin.get("type")) || ours(plugin.get("ipam").and_then(|ipam| ipam.get("type")))
        };
        self.plugins.iter().any(asks)
    }

    /// Whether any of its plugins declares the capability.
    pub(in crate::cni) fn declares(&self, capability: &str) -> bool {
        self.plugins.iter().any(|plugin| declares(plugin, capability))
    }

    /// ADD: each plugin gets the result of the one before. `progress` hears of each plugin before it can do anything, and each
    /// result before the next plugin runs; the last of them is the network's, which is returned.
    ///
    /// # Errors
    /// Of the first plugin that fails, and of `progress`. Nothing is taken back.
    pub fn add(
        &self,
        plugins: &Plugins,
        call: &PluginCall,
        capabilities: &Map<String, Value>,
        mut progress: impl FnMut(Progress<'_>) -> Result<(), CniError>,
    ) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in &self.plugins {
            let conf = self.conf(plugin, capabilities, result.as_ref());
            let mut noted = |group| progress(Progress::Started(group)).map_err(io::Error::other);
            let answer = plugins.run_noting(&name_of(plugin), Verb::Add, call, &conf, &mut noted)?;
            let mut answer = answer.unwrap_or_default();
            self.check_result(plugin, &answer)?;
            // Written in the version of the configuration (containernetworking/cni issue 895). The plugins to which it is handed
            // on refuse a result that does not say so.
            if answer.get("cniVersion").is_none_or(|v| v.is_null() || v == "" || v == TEXT_MENDED) {
                answer["cniVersion"] = json!(self.version);
            }
            progress(Progress::Told(&answer))?;
            result = Some(answer);
        }
        Ok(result.unwrap_or_default())
    }

    /// CHECK, in the order of ADD; with the result that ADD had. Nothing where the version has no CHECK (0.4.0), or the
    /// list forbids it.
    ///
    /// # Errors
    /// Of each plugin that finds a difference.
    pub fn check(
        &self,
        plugins: &Plugins,
        call: &PluginCall,
        capabilities: &Map<String, Value>,
        result: &Value,
    ) -> Vec<CniError> {
        if self.version < SpecVersion::V0_4_0 || self.disable_check {
            return Vec::new();
        }
        let check = |plugin| {
            let conf = self.conf(plugin, capabilities, Some(result));
            self.run(plugins, plugin, Verb::Check, call, &conf).err().map(CniError::from)
        };
        self.plugins.iter().filter_map(check).collect()
    }

    /// DEL, in reverse, with what ADD came to so far where that is known. Goes on over failures, and returns them.
    pub fn del(
        &self,
        plugins: &Plugins,
        call: &PluginCall,
        capabilities: &Map<String, Value>,
        result: Option<&Value>,
    ) -> Vec<CniError> {
        let result = result.filter(|_| self.version >= SpecVersion::V0_4_0);
        let del = |plugin| match self.run(plugins, plugin, Verb::Del, call, &self.conf(plugin, capabilities, result)) {
            Err(error) if error.is_unknown_container() => None,
            outcome => outcome.err().map(CniError::from),
        };
        self.plugins.iter().rev().filter_map(del).collect()
    }

    /// GC with what is alive, in order. Nothing where the version has no GC (1.1.0), or the list forbids it. Goes on over
    /// failures, and returns them.
    pub fn gc(&self, plugins: &Plugins, call: &PluginCall, valid: &Value) -> Vec<CniError> {
        if self.version < SpecVersion::V1_1_0 || self.disable_gc {
            return Vec::new();
        }
        let gc = |plugin| {
            let mut conf = self.conf(plugin, &Map::new(), None);
            // libcni says the older name too.
            for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
                conf[key] = valid.clone();
            }
            self.run(plugins, plugin, Verb::Gc, call, &conf).err().map(CniError::from)
        };
        self.plugins.iter().filter_map(gc).collect()
    }

    /// Whether each of its plugins is there.
    ///
    /// # Errors
    /// [`DelegateError::NotFound`] of the first that is not.
    pub fn find_all(&self, plugins: &Plugins) -> Result<(), DelegateError> {
        self.plugins.iter().try_for_each(|plugin| plugins.find(&name_of(plugin)).map(drop))
    }

    /// STATUS of each plugin, where the version has it (1.1.0); else whether each is there.
    ///
    /// # Errors
    /// Of the first that is not ready, or not there.
    pub fn status(&self, plugins: &Plugins, call: &PluginCall) -> Result<(), CniError> {
        self.find_all(plugins)?;
        if self.version >= SpecVersion::V1_1_0 {
            for plugin in &self.plugins {
                self.run(plugins, plugin, Verb::Status, call, &self.conf(plugin, &Map::new(), None))?;
            }
        }
        Ok(())
    }

    fn run(
        &self,
        plugins: &Plugins,
        plugin: &Map<String, Value>,
        verb: Verb,
        call: &PluginCall,
        conf: &Value,
    ) -> Result<Option<Value>, DelegateError> {
        plugins.run(&name_of(plugin), verb, call, conf)
    }

    /// What the plugin reads: its own keys, those of the list, the capabilities that it declares, and the result so far.
    fn conf(&self, plugin: &Map<String, Value>, capabilities: &Map<String, Value>, result: Option<&Value>) -> Value {
        let mut conf = plugin.clone();
        conf.insert("name".to_owned(), json!(self.name));
        conf.insert("cniVersion".to_owned(), json!(self.version.as_str()));
        let granted = capabilities.iter().filter(|(capability, _)| declares(plugin, capability));
        let mut runtime: Map<_, _> = conf.get("runtimeConfig").and_then(Value::as_object).cloned().unwrap_or_default();
        runtime.extend(granted.map(|(capability, value)| (capability.clone(), value.clone())));
        if !runtime.is_empty() {
            conf.insert("runtimeConfig".to_owned(), Value::Object(runtime));
        }
        if let Some(result) = result {
            conf.insert("prevResult".to_owned(), result.clone());
        }
        Value::Object(conf)
    }

    /// Refuses a result that could not be handed on. What is not known of it stays.
    fn check_result(&self, plugin: &Map<String, Value>, answer: &Value) -> Result<(), CniError> {
        let refuse = |reason: String| {
            let plugin = plugin.get("type").and_then(Value::as_str).unwrap_or_default();
            Err(CniError::new(
                ErrorCode::Failed,
                format!("plugin {plugin}: ADD: its answer is no CNI result: {reason}"),
            ))
        };
        match answer.get("cniVersion") {
            // Go reads null as an empty text.
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() || text == TEXT_MENDED => {}
            Some(Value::String(text)) => {
                if let Err(error) = text.parse::<SpecVersion>() {
                    return refuse(error.message);
                }
            }
            Some(other) => return refuse(format!("cniVersion: {other} is not a string")),
        }
        for list in ["interfaces", "ips", "routes"] {
            let is_list =
                |value: &Value| value.is_null() || value.as_array().is_some_and(|l| l.iter().all(Value::is_object));
            if !answer.get(list).is_none_or(is_list) {
                return refuse(format!("{list} is not a list of objects"));
            }
        }
        Ok(())
    }
}

/// A version whose text alone 0.3.1 mends.
const TEXT_MENDED: &str = "0.3.0";

/// Checked when it was read; in a record that somebody changed it may be the name of no program.
fn name_of(plugin: &Map<String, Value>) -> PluginName {
    plugin_name(plugin).unwrap_or_else(|_| PluginName::none())
}

fn plugin_name(plugin: &Map<String, Value>) -> Result<PluginName, String> {
    match plugin.get("type") {
        Some(Value::String(name)) => name.parse().map_err(|e: crate::model::ParseError| e.to_string()),
        Some(other) => Err(format!("{other} is not a string; name the plugin's program")),
        None => Err("missing; name the plugin's program".to_owned()),
    }
}

fn declares(plugin: &Map<String, Value>, capability: &str) -> bool {
    plugin.get("capabilities").and_then(|c| c.get(capability)).is_some_and(|declared| *declared == Value::Bool(true))
}
