//! Text tables with aligned columns.

use std::fmt;

/// Rows of text under a header. Columns named in `right` are aligned to the right.
pub struct Table {
    header: Vec<&'static str>,
    right: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(header: &[&'static str], right: &'static [&'static str]) -> Self {
        Self { header: header.to_vec(), right, rows: Vec::new() }
    }

    /// Adds a row with one cell per column.
    pub fn push(&mut self, row: Vec<String>) {
        debug_assert_eq!(row.len(), self.header.len());
        self.rows.push(row);
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn widths(&self) -> Vec<usize> {
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        self.header.iter().enumerate().map(|(c, h)| width(c).max(h.chars().count())).collect()
    }

    fn line(&self, f: &mut fmt::Formatter<'_>, cells: &[&str], widths: &[usize]) -> fmt::Result {
        let cell = |(c, text): (usize, &&str)| match self.right.contains(&self.header[c]) {
            true => format!("{text:>width$}", width = widths[c]),
            false => format!("{text:<width$}", width = widths[c]),
        };
        let cells: Vec<_> = cells.iter().enumerate().map(cell).collect();
        writeln!(f, "{}", cells.join("  ").trim_end())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let rule: Vec<_> = widths.iter().map(|&w| "-".repeat(w)).collect();
        self.line(f, &self.header, &widths)?;
        self.line(f, &rule.iter().map(String::as_str).collect::<Vec<_>>(), &widths)?;
        self.rows
            .iter()
            .try_for_each(|row| self.line(f, &row.iter().map(String::as_str).collect::<Vec<_>>(), &widths))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["name", "n"], &["n"]);
        table.push(vec!["a".into(), "1".into()]);
        table.push(vec!["long name".into(), "10".into()]);
        assert_eq!(table.to_string(), "name        n\n---------  --\na           1\nlong name  10\n");
    }
}
