//! Plots of characters.

use std::fmt::Write as _;

/// Shades from nothing to everything.
const SHADES: [char; 5] = ['·', '░', '▒', '▓', '█'];
/// Characters of the longest bar.
const BAR_WIDTH: usize = 48;
/// Eighths of a character.
const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];

/// One cell of a heat map for a share of 0 to 1.
pub fn shade(share: f64) -> char {
    // Only all is full and only none is empty: what lies between must not look like either.
    match share {
        s if s <= 0.0 => SHADES[0],
        s if s >= 1.0 => SHADES[4],
        s => SHADES[1 + ((s * 3.0) as usize).min(2)],
    }
}

/// A bar a line: label, bar, value. The longest bar is the largest value.
pub fn bars(lines: &[(String, f64)]) -> String {
    let labels = lines.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let largest = lines.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let mut text = String::new();
    for (label, value) in lines {
        let eighths = (value.max(0.0) / largest * (8 * BAR_WIDTH) as f64).round() as usize;
        let mut bar = "█".repeat(eighths / 8);
        if !eighths.is_multiple_of(8) {
            bar.push(EIGHTHS[eighths % 8]);
        }
        let _ = writeln!(text, "{label:>labels$}  {bar:<BAR_WIDTH$}  {}", crate::table::number(*value));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_all_is_full_and_only_none_is_empty() {
        let shades: String = [0.0, 0.001, 0.33, 0.34, 0.67, 0.999, 1.0].map(shade).iter().collect();
        assert_eq!(shades, "·░░▒▓▓█");
    }

    #[test]
    fn bars_are_in_proportion() {
        let lines = [("a".to_owned(), 1.0), ("bb".to_owned(), 4.0), ("c".to_owned(), 0.0)];
        let text = bars(&lines);
        let lengths: Vec<usize> =
            text.lines().map(|line| line.chars().filter(|c| *c == '█').count()).collect();
        assert_eq!(lengths, [12, 48, 0], "{text}");
        assert!(text.lines().next().is_some_and(|line| line.starts_with(" a  ")), "{text}");
    }
}
