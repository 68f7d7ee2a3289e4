//! Tables in the form of runc: columns at least 12 wide, 3 spaces apart.

/// Width of a column whose cells are all shorter, in characters.
const MIN_WIDTH: usize = 12;

/// Spaces after the longest cell of a column.
const PADDING: usize = 3;

/// Lines of a table; rows shorter than the first one have empty cells at their end.
pub fn format(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<_> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
            MIN_WIDTH.max(longest + PADDING)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            if column + 1 == columns {
                text.push_str(cell);
            } else {
                text.push_str(&format!("{cell:width$}", width = widths[column]));
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn short_cells_are_twelve_wide_and_the_last_is_as_it_is() {
        assert_eq!(format(&[row(&["ID", "PID"])]), "ID          PID\n");
    }

    #[test]
    fn a_long_cell_widens_its_column() {
        let text = format(&[row(&["A", "B"]), row(&["0123456789abcdef", "x"])]);

        assert_eq!(text, "A                  B\n0123456789abcdef   x\n");
    }
}
