//! Tables for a terminal: numbers of three digits in columns that line up.

use std::fmt::Write as _;

/// Three significant digits for small numbers, no decimals for large ones.
pub fn number(value: f64) -> String {
    match value {
        v if v < 1.0 => format!("{v:.3}"),
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

/// Columns as wide as their widest cell: the first to the left, the others to the right. A rule follows the header.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            if column == 0 {
                let _ = write!(line, "{cell:<width$}");
            } else {
                let _ = write!(line, "  {cell:>width$}");
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
        if number == 0 {
            let rule = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
            text.push_str(&"─".repeat(rule));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["hop", "a"], vec!["prefill", "12.5"], vec!["é", "1"]];
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(|cell| (*cell).to_owned()).collect()).collect();
        let expected = "\
hop         a
─────────────
prefill  12.5
é           1
";
        assert_eq!(aligned(&rows), expected);
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (value, expected) in
            [(0.0, "0.000"), (0.1234, "0.123"), (9.876, "9.88"), (98.76, "98.8"), (1234.5, "1234")]
        {
            assert_eq!(number(value), expected);
        }
    }
}
