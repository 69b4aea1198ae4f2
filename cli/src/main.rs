//! The `lora-kernels` command.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod demo;
mod dequantize;
mod extract;
mod initial;
mod inspect;
mod merge;
mod model;
mod quantize;
mod reduce;
mod size;
mod table;
mod tensors;
mod unmerge;
mod verify;

/// Low-rank adapters on dense and NF4 weights.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run 4-bit weights and adapters from file to result, and compare with the stored truth.
    Demo(demo::Arguments),
    /// Show what a checkpoint or an adapter holds.
    Inspect(inspect::Arguments),
    /// Quantise a model's folder to 4 bits, as bitsandbytes and transformers load it.
    Quantize(quantize::Arguments),
    /// Turn a 4-bit model's folder into a dense one.
    Dequantize(dequantize::Arguments),
    /// Merge adapters into a model's folder.
    Merge(merge::Arguments),
    /// Take merged adapters out of a model's folder again.
    Unmerge(unmerge::Arguments),
    /// Make an adapter of what tuning has changed in a model.
    Extract(extract::Arguments),
    /// Bring an adapter to smaller ranks.
    #[command(after_help = reduce::EXAMPLES, alias = "resize")]
    Reduce(reduce::Arguments),
    /// Quantise a model without its principal part, which becomes the adapter that training begins with (PiSSA).
    #[command(after_help = initial::PISSA_EXAMPLES)]
    Pissa(initial::Arguments),
    /// Quantise a model, and make an adapter of what that loses for training to begin with (LoftQ).
    #[command(after_help = initial::LOFTQ_EXAMPLES)]
    Loftq(initial::LoftqArguments),
    /// Tell how large an adapter for a model is, and the model, from its config.json.
    Size(size::Arguments),
    /// Check this library against a folder of reference data.
    Verify(verify::Arguments),
}

/// An error and its causes, each said once.
fn text(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.ends_with(&cause) { text } else { format!("{text}: {cause}") }
    })
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Quantize(arguments) => quantize::run(&arguments),
        Command::Dequantize(arguments) => dequantize::run(&arguments),
        Command::Merge(arguments) => merge::run(&arguments),
        Command::Unmerge(arguments) => unmerge::run(&arguments),
        Command::Extract(arguments) => extract::run(&arguments),
        Command::Reduce(arguments) => reduce::run(&arguments),
        Command::Pissa(arguments) => initial::pissa(&arguments),
        Command::Loftq(arguments) => initial::loftq(&arguments),
        Command::Size(arguments) => size::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {}", text(&error));
            ExitCode::FAILURE
        }
    }
}
