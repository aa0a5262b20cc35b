//! Aligned text: the first column to the left, numbers to the right, two spaces between columns; folded where it is too wide.

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

/// As [`render`] does it, in blocks that are each at most `columns` wide: the first `n_fixed` columns stand in every block. A line keeps its
/// index, so that a caller can distinguish headers from rows. A column that is too wide alone stays as it is.
pub fn fold(lines: &[Line], columns: Option<usize>, n_fixed: usize) -> Vec<Vec<(usize, String)>> {
    let widths = widths(lines);
    let mut blocks: Vec<Vec<usize>> = vec![Vec::new()];
    let fixed: usize = widths.iter().take(n_fixed).map(|width| width + 2).sum();
    let mut used = fixed;
    for (at, width) in widths.iter().enumerate().skip(n_fixed) {
        let is_too_wide = columns.is_some_and(|columns| used + width > columns);
        if is_too_wide && blocks.last().is_some_and(|block| !block.is_empty()) {
            blocks.push(Vec::new());
            used = fixed;
        }
        used += width + 2;
        blocks.last_mut().expect("never empty").push(at);
    }
    let is_first = |block: &[usize]| block.first().is_none_or(|at| *at <= n_fixed);
    let block = |block: &Vec<usize>| {
        let shown = lines.iter().enumerate().filter_map(|(index, line)| match line {
            Line::Cells(cells) => {
                let picked = (0..n_fixed).chain(block.iter().copied());
                Some((index, Line::Cells(picked.filter_map(|at| cells.get(at).cloned()).collect())))
            }
            // A reason is shown once.
            Line::Span(head, text) => is_first(block).then(|| (index, Line::Span(head.clone(), text.clone()))),
        });
        let (indices, picked): (Vec<usize>, Vec<Line>) = shown.unzip();
        let text = render(&picked);
        indices.into_iter().zip(text.lines().map(str::to_owned)).collect()
    };
    blocks.iter().map(block).collect()
}

/// As [`fold`], as one text with an empty line between blocks.
pub fn folded(lines: &[Line], columns: Option<usize>, n_fixed: usize) -> String {
    let block = |block: Vec<(usize, String)>| block.into_iter().map(|(_, text)| text + "\n").collect::<String>();
    fold(lines, columns, n_fixed).into_iter().map(block).collect::<Vec<_>>().join("\n")
}

/// Each line of `text` as [`wrap`] cuts it.
pub fn wrap_lines(text: &str, columns: Option<usize>, indent: usize) -> String {
    text.lines().map(|line| wrap(line, columns, indent) + "\n").collect()
}

/// `text` in lines of at most `columns`, cut between words; those after the first begin with `indent` spaces. A word that is longer stays
/// whole.
pub fn wrap(text: &str, columns: Option<usize>, indent: usize) -> String {
    let Some(columns) = columns.map(|columns| columns.max(indent + 10)) else { return text.to_owned() };
    let (mut out, mut used) = (String::with_capacity(text.len()), 0);
    for (at, word) in text.split(' ').enumerate() {
        let length = word.chars().count();
        if at > 0 && used + 1 + length > columns {
            out.push('\n');
            out += &" ".repeat(indent);
            used = indent;
        } else if at > 0 {
            out.push(' ');
            used += 1;
        }
        out += word;
        used += length;
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
    fn a_wide_grid_folds_and_repeats_its_first_column() {
        let cells = |row: [&str; 4]| Line::Cells(row.map(String::from).to_vec());
        let lines = [cells(["name", "first", "second", "third"]), cells(["x", "1", "2", "3"])];
        let folded = |columns| {
            let blocks = fold(&lines, columns, 1).into_iter();
            blocks.map(|block| block.into_iter().map(|(_, text)| text).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        assert_eq!(folded(None), [["name  first  second  third", "x         1       2      3"]]);
        assert_eq!(folded(Some(26)), folded(None));
        assert_eq!(folded(Some(25)), [["name  first  second", "x         1       2"], ["name  third", "x         3"]]);
        let narrow = folded(Some(1));
        assert_eq!(
            narrow,
            [["name  first", "x         1"], ["name  second", "x          2"], ["name  third", "x         3"]]
        );
        let failed = [cells(["name", "first", "second", "third"]), Line::Span("x".into(), "oom: too large".into())];
        let failed: Vec<usize> = fold(&failed, Some(12), 1).iter().map(Vec::len).collect();
        assert_eq!(failed, [2, 1, 1], "a reason is shown once");
    }

    #[test]
    fn a_text_wraps_between_words() {
        assert_eq!(wrap("one two three", Some(12), 2), "one two\n  three");
        assert_eq!(wrap("one two three", None, 2), "one two three");
        assert_eq!(wrap("extraordinarily long", Some(12), 0), "extraordinarily\nlong");
        assert_eq!(wrap("", Some(12), 2), "");
    }

    #[test]
    fn an_empty_grid_is_empty() {
        assert_eq!(render(&[]), "");
    }
}
