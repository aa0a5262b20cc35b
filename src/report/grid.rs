//! Aligned text: the first column to the left, numbers to the right, two spaces between columns.

/// A line of a grid.
pub enum Line {
    /// One text a column.
    Cells(Vec<String>),
    /// The first column, then one text over all others, such as a reason.
    Span(String, String),
}

/// Lines of text that end in a newline each, without trailing blanks.
pub fn render(lines: &[Line]) -> String {
    let widths = widths(lines);
    let first = widths.first().copied().unwrap_or(0);
    let mut out = String::new();
    for line in lines {
        let text = match line {
            Line::Cells(cells) => cells
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(i, (cell, &width))| match i {
                    0 => format!("{cell:<width$}"),
                    _ => format!("  {cell:>width$}"),
                })
                .collect(),
            Line::Span(head, text) => format!("{head:<first$}  {text}"),
        };
        out += text.trim_end();
        out.push('\n');
    }
    out
}

/// In characters: what tables hold is one cell wide each, `±` and `×` included.
fn widths(lines: &[Line]) -> Vec<usize> {
    let mut widths: Vec<usize> = Vec::new();
    for line in lines {
        let cells = match line {
            Line::Cells(cells) => cells.as_slice(),
            Line::Span(head, _) => std::slice::from_ref(head),
        };
        widths.resize(widths.len().max(cells.len()), 0);
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    widths
}

/// Decimals for a column whose largest magnitude is `largest`: about four digits there, and the same for each row.
pub fn decimals(largest: f64) -> usize {
    match largest {
        x if x >= 1000.0 => 0,
        x if x >= 100.0 => 1,
        x if x >= 0.1 => 2,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_align_right_and_reasons_span() {
        let cells = |row: [&str; 3]| Line::Cells(row.map(String::from).to_vec());
        let lines =
            [cells(["name", "a", "long"]), cells(["x", "1 ± 2", "-"]), Line::Span("longer name".into(), "oom".into())];
        assert_eq!(render(&lines), "name             a  long\nx            1 ± 2     -\nlonger name  oom\n");
    }

    #[test]
    fn an_empty_grid_is_empty() {
        assert_eq!(render(&[]), "");
    }
}
