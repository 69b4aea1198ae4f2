//! The tables of what merges lose, and of how large undo records are, are what their command prints.

#[allow(dead_code, reason = "the command itself")]
#[path = "../examples/merge_loss.rs"]
mod command;

use command::{Problem, loss_table, undo_table};

/// Compares rows of tables: words are equal, and numbers are so but for a unit in their last digit, because sums of the
/// products depend on the vector instructions that there are.
fn assert_rows_are_in(committed: &str, printed: &str, columns: impl Fn(usize) -> Option<usize>) {
    let cells = |line: &str| line.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>();
    let close = |a: &str, b: &str| match (a.parse::<f64>(), b.parse::<f64>()) {
        (Ok(x), Ok(y)) => {
            let digits = a.split_once('.').map_or(0, |(_, digits)| digits.len() as i32);
            (x - y).abs() < 1.5 * 10f64.powi(-digits)
        }
        _ => a == b,
    };
    let committed: Vec<Vec<String>> = committed.lines().skip(2).map(cells).collect();
    let rows: Vec<&str> = printed.lines().skip(2).collect();
    assert!(!rows.is_empty());
    for row in rows {
        let printed = cells(row);
        let same = |committed: &Vec<String>| {
            printed.iter().enumerate().all(|(i, cell)| {
                columns(i).is_none_or(|at| committed.get(at).is_some_and(|other| close(cell, other)))
            })
        };
        assert!(committed.iter().any(same), "cargo run --release --example merge_loss -- --write: {row}");
    }
}

#[test]
fn the_table_of_losses_is_printed() {
    let printed = loss_table(&[&Problem::real().unwrap()], &[0.03, 0.1]).unwrap();
    assert_rows_are_in(include_str!("../src/adapter/merge_loss.md"), &printed, Some);
}

#[test]
fn the_table_of_records_is_printed() {
    let printed = undo_table(&Problem::synthetic(1024).unwrap(), &[0.1]).unwrap();
    let committed = include_str!("../src/adapter/undo_size.md");
    let column = committed.lines().next().unwrap().split('|').position(|cell| cell.trim() == "10 %").unwrap();
    // The one ratio that was asked for, and the empty cell after it.
    assert_rows_are_in(committed, &printed, |i| match i {
        4 => Some(column),
        5 => None,
        i => Some(i),
    });
}
