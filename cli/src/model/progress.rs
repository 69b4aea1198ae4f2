//! What a run shows while it works, and what it says at the end.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

/// Bytes read and written, and the time since the start.
pub struct Summary {
    start: Instant,
    bar: ProgressBar,
    lines: Vec<String>,
    fields: Map<String, Value>,
}

impl Summary {
    /// Starts the clock. The bar is shown on a terminal only.
    pub fn start() -> Self {
        let style = "{spinner} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(style).expect("a template");
        let bar = ProgressBar::no_length().with_style(style);
        Self { start: Instant::now(), bar, lines: Vec::new(), fields: Map::new() }
    }

    /// The bar, in bytes of the input.
    pub fn bar(&self) -> &ProgressBar {
        &self.bar
    }

    /// Adds a line for people.
    pub fn say(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    /// Adds a field for machines.
    pub fn field(&mut self, key: &str, value: impl Into<Value>) {
        self.fields.insert(key.to_owned(), value.into());
    }

    /// Prints one or the other.
    pub fn finish(mut self, what: &str, bytes: [u64; 2], machines: bool) {
        self.bar.finish_and_clear();
        let [read, written] = bytes;
        let time = self.start.elapsed();
        if machines {
            self.field("bytes_read", read);
            self.field("bytes_written", written);
            self.field("seconds", time.as_secs_f64());
            println!("{}", Value::Object(self.fields));
            return;
        }
        self.lines.iter().for_each(|line| println!("{line}"));
        println!(
            "{what}: {} read, {} written, in {:.1} s ({} of input a second)",
            size(read),
            size(written),
            time.as_secs_f64(),
            size(rate(read, time)),
        );
    }
}

fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64
}

/// Bytes, in the largest unit below them.
fn size(bytes: u64) -> String {
    let units = [(1u64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} bytes"),
    }
}

/// A number for machines; null when it is none.
pub fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { Value::Null }
}
