//! `demo`: the main job on the repository's own data: a 4-bit checkpoint and adapters, from file to result.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::table::Table;
use crate::verify::{self, Case, Choice, Report, Stage, Verdict};

/// What is shown: a file or folder of the reference data, and what it is.
const PARTS: [(&str, &str); 5] = [
    (
        "nf4_checkpoint/hf_dq_bf16",
        "a 4-bit Llama that transformers wrote: 7 projections, decoded and multiplied",
    ),
    (
        "real_minilm",
        "two layers of all-MiniLM-L6-v2: quantised here, byte for byte as bitsandbytes does, and multiplied",
    ),
    ("peft/llama/lora_r8a16", "a LoRA adapter that PEFT wrote, on a dense Llama: 7 projections"),
    ("peft/llama/dora_r8", "a DoRA adapter that PEFT wrote, on the same model"),
    (
        "qlora",
        "LoRA, rsLoRA and DoRA on 4-bit weights: batches of 1 to 33 tokens, merged into 4 bits and out again",
    ),
];

/// Arguments of `lora-kernels demo`.
#[derive(clap::Args)]
pub struct Arguments {
    /// Where the operations run [default: the GPU, or the CPU where there is none].
    #[arg(long, value_enum)]
    device: Option<Choice>,
    /// The reference data.
    #[arg(long, default_value_os_t = data())]
    data: PathBuf,
}

/// The reference data of the checkout that this was built in.
fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("tests").join("data")
}

/// Columns of the tables, and what they show.
const COLUMNS: [(&str, Stage); 5] = [
    ("4-bit codes", Stage::Bits),
    ("forward f32", Stage::Forward),
    ("forward bf16", Stage::Forward16),
    ("merged", Stage::Merged),
    ("unmerged", Stage::Unmerged),
];

/// Runs the command. Whether everything is within its bounds.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let (engine, why) = match arguments.device {
        Some(choice) => (verify::open(choice)?, None),
        None => verify::open_best()?,
    };
    println!("device: {}", engine.name());
    why.inspect(|why| println!("        ({why})"));
    println!("data:   {}", arguments.data.display());
    println!("cells:  largest error against the stored truth / bound of the error analysis");
    let (mut good, mut count, mut time) = (true, 0, Duration::ZERO);
    for (label, about) in PARTS {
        let family = label.split('/').next().unwrap_or(label).to_owned();
        let report = verify::check(&arguments.data, &[family], Some(label), &*engine)?;
        ensure!(
            report.cases().next().is_some(),
            "{}: no such reference data",
            arguments.data.join(label).display()
        );
        print!("\n{label}: {about}\n\n{}", table(label, &report));
        print!("{}", report.failures());
        good &= report.is_good();
        count += report.cases().count();
        time += report.cases().map(Case::elapsed).sum::<Duration>();
    }
    let verdict =
        if good { "every error is within its bound" } else { "NOT every error is within its bound" };
    println!("\n{count} cases, {:.0} ms on the device: {verdict}", milliseconds(time));
    Ok(good)
}

/// A row per case that the device has worked on.
fn table(label: &str, report: &Report) -> Table {
    let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
    let header = [&["", "projection"], &names[..], &["time"]].concat();
    let mut table =
        Table::new(&header, &["4-bit codes", "forward f32", "forward bf16", "merged", "unmerged", "time"]);
    for case in report.cases().filter(|c| c.verdict() != Verdict::Passed || !c.elapsed().is_zero()) {
        let cells = COLUMNS.iter().map(|(_, stage)| case.worst(*stage).unwrap_or_else(|| "-".to_owned()));
        let row = [case.verdict().to_string(), case.title(label)].into_iter().chain(cells);
        table.push(row.chain([format!("{:.2} ms", milliseconds(case.elapsed()))]).collect());
    }
    table
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
