//! Flows as lines of JSON.

use std::io::{self, Write};

use serde::Serialize;

use super::{Flow, FlowSink, Losses};

/// Writes a line of JSON for each flow, and one with the key `lost` for losses.
#[derive(Debug)]
pub struct JsonLines<W>(pub W);

impl<W: Write> FlowSink for JsonLines<W> {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        serde_json::to_writer(&mut self.0, flow)?;
        self.0.write_all(b"\n")
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        #[derive(Serialize)]
        struct Line {
            lost: Losses,
        }
        serde_json::to_writer(&mut self.0, &Line { lost: losses })?;
        self.0.write_all(b"\n")
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
