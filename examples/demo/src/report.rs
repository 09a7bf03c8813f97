//! What the demo tells: lines for people, or one JSON object.

use std::io::IsTerminal;

use serde::Serialize;

/// Everything that the demo found.
#[derive(Debug, Serialize)]
pub struct Report {
    steps: Vec<Step>,
    #[serde(skip)]
    style: Style,
}

#[derive(Debug, Serialize)]
struct Step {
    title: String,
    notes: Vec<String>,
    checks: Vec<Check>,
}

/// One expectation and what was seen.
#[derive(Debug, Serialize)]
struct Check {
    what: String,
    expected: String,
    observed: String,
    ok: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// Nothing until the end, then JSON.
    Json,
    /// Lines with colour.
    Terminal,
    /// Lines without.
    Plain,
}

impl Report {
    /// A report for people, coloured only on a terminal, or for programs.
    pub fn new(json: bool) -> Self {
        let style = match (json, std::io::stdout().is_terminal()) {
            (true, _) => Style::Json,
            (false, true) => Style::Terminal,
            (false, false) => Style::Plain,
        };
        Self { steps: Vec::new(), style }
    }

    /// Begins the next step.
    pub fn step(&mut self, title: &str) {
        let number = self.steps.len() + 1;
        self.print(|style| style.bold(&format!("\n{number}. {title}")));
        self.steps.push(Step { title: title.to_owned(), notes: Vec::new(), checks: Vec::new() });
    }

    /// Tells something that is neither right nor wrong.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        self.print(|_| format!("   {text}"));
        self.current().notes.push(text);
    }

    /// Compares what was seen with what was expected.
    pub fn expect(&mut self, what: impl Into<String>, expected: impl ToString, observed: impl ToString) -> bool {
        let (expected, observed) = (expected.to_string(), observed.to_string());
        let ok = expected == observed;
        self.record(Check { what: what.into(), expected, observed, ok })
    }

    /// States whether something held, with what was seen.
    pub fn holds(&mut self, what: impl Into<String>, ok: bool, observed: impl ToString) -> bool {
        self.record(Check { what: what.into(), expected: String::new(), observed: observed.to_string(), ok })
    }

    /// Whether every expectation held so far.
    pub fn ok(&self) -> bool {
        self.steps.iter().flat_map(|s| &s.checks).all(|c| c.ok)
    }

    /// Tells the outcome; as JSON, all of it.
    pub fn finish(&self, seconds: f64) {
        if self.style == Style::Json {
            let text = serde_json::json!({ "ok": self.ok(), "seconds": seconds, "steps": self.steps });
            println!("{text:#}");
            return;
        }
        let checks = self.steps.iter().flat_map(|s| &s.checks);
        let (held, all) = (checks.clone().filter(|c| c.ok).count(), checks.count());
        let verdict = if held == all { self.style.green("All is well") } else { self.style.red("FAILED") };
        println!("\n{verdict}: {held} of {all} expectations held, in {seconds:.1} s.");
    }

    fn record(&mut self, check: Check) -> bool {
        let ok = check.ok;
        self.print(|style| {
            let mark = if ok { style.green("ok  ") } else { style.red("FAIL") };
            let seen = match (check.expected.as_str(), ok) {
                (_, true) => check.observed.clone(),
                ("", false) => check.observed.clone(),
                (expected, false) => format!("{} (expected {expected})", check.observed),
            };
            format!("   {mark} {}: {seen}", check.what)
        });
        self.current().checks.push(check);
        ok
    }

    fn current(&mut self) -> &mut Step {
        if self.steps.is_empty() {
            self.steps.push(Step { title: String::new(), notes: Vec::new(), checks: Vec::new() });
        }
        self.steps.last_mut().expect("there is a step")
    }

    fn print(&self, line: impl FnOnce(Style) -> String) {
        if self.style != Style::Json {
            println!("{}", line(self.style));
        }
    }
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self == Self::Terminal { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    fn red(self, text: &str) -> String {
        self.paint("31", text)
    }
}
