//! The one printer: every view goes to stdout through here, as table, wide table, JSON or YAML.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement};
use jiff::Timestamp;
use serde::Serialize;

use crate::ink::{self, Ink};
use crate::when;

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For people with wide screens: more columns
    Wide,
    /// One document; field names are stable
    Json,
    /// The same document as YAML
    Yaml,
}

/// Something a command shows: one document for machines, one page for people.
pub trait View: Serialize {
    fn draw(&self, page: &mut Page);
}

#[derive(Debug, thiserror::Error)]
pub enum PrintError {
    #[error("write the answer as {format:?}: {reason}")]
    Encode { format: Format, reason: String },
}

/// The text of `view` in `format`, with a final newline.
pub fn render<V: View>(view: &V, format: Format, now: Timestamp, colour: bool) -> Result<String, PrintError> {
    let encode = |reason: String| PrintError::Encode { format, reason };
    match format {
        Format::Json => {
            let mut text = serde_json::to_string_pretty(view).map_err(|error| encode(error.to_string()))?;
            text.push('\n');
            Ok(text)
        }
        Format::Yaml => serde_yaml_ng::to_string(view).map_err(|error| encode(error.to_string())),
        Format::Table | Format::Wide => {
            let mut page = Page { text: String::new(), wide: format == Format::Wide, now };
            view.draw(&mut page);
            Ok(ink::finish(&page.text, colour))
        }
    }
}

/// Text under construction.
pub struct Page {
    text: String,
    pub wide: bool,
    pub now: Timestamp,
}

impl Page {
    pub fn line(&mut self, text: impl AsRef<str>) {
        self.text.push_str(text.as_ref().trim_end());
        self.text.push('\n');
    }

    pub fn gap(&mut self) {
        if !self.text.is_empty() && !self.text.ends_with("\n\n") {
            self.text.push('\n');
        }
    }

    /// `2026-06-04 14:31:59 UTC (10m ago)`
    pub fn when(&self, at: Option<Timestamp>) -> String {
        at.map(|at| when::full(at, self.now)).unwrap_or_default()
    }

    /// The distance alone where a line has no room; the whole time on a wide page.
    pub fn short_when(&self, at: Option<Timestamp>) -> String {
        if self.wide { self.when(at) } else { at.map(|at| when::relative(at, self.now)).unwrap_or_default() }
    }

    /// Names and values below each other; a value that is empty is left out.
    pub fn pairs(&mut self, pairs: &[(&str, String)]) {
        let shown = || pairs.iter().filter(|(_, value)| !value.is_empty());
        let width = shown().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in shown() {
            let mut lines = value.lines();
            self.line(format!("  {name:width$}  {}", lines.next().unwrap_or_default()));
            for more in lines {
                self.line(format!("  {:width$}  {more}", ""));
            }
        }
    }

    pub fn table(&mut self, table: Table) {
        let wide = self.wide;
        let shown: Vec<usize> = (0..table.columns.len()).filter(|&i| wide || !table.columns[i].wide).collect();
        let mut drawn = comfy_table::Table::new();
        drawn.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        let pick = |cells: &[String]| -> Vec<String> {
            shown.iter().map(|&i| cells.get(i).cloned().unwrap_or_default()).collect()
        };
        let names: Vec<String> = table.columns.iter().map(|column| column.name.to_owned()).collect();
        drawn.set_header(pick(&names));
        for row in &table.rows {
            drawn.add_row(pick(row).into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }));
        }
        for (position, &index) in shown.iter().enumerate() {
            if let Some(column) = drawn.column_mut(position) {
                column.set_padding((0, 2));
                if table.columns[index].right {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        for line in drawn.lines() {
            self.line(line);
        }
    }
}

struct Column {
    name: &'static str,
    wide: bool,
    right: bool,
}

/// Rows under named columns. A name that begins with `>` is set right, one that begins with `+` appears on wide pages
/// only (`+>` both).
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(columns: &[&'static str]) -> Table {
        let columns = columns
            .iter()
            .map(|name| {
                let (name, wide) = name.strip_prefix('+').map_or((*name, false), |rest| (rest, true));
                let (name, right) = name.strip_prefix('>').map_or((name, false), |rest| (rest, true));
                Column { name, wide, right }
            })
            .collect();
        Table { columns, rows: Vec::new() }
    }

    /// One cell for every column, wide ones included; an empty one is shown as a dash.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(N, self.columns.len());
        self.rows.push(cells.into());
    }
}

/// `env=prod,tier=a`
pub fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    labels.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(",")
}

/// `1 cluster`, `3 clusters`
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

/// A remark below a table.
pub fn faint(text: impl AsRef<str>) -> String {
    Ink::Faint.on(text.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Names(Vec<&'static str>);

    impl View for Names {
        fn draw(&self, page: &mut Page) {
            let mut table = Table::new(&["NAME", "+>LENGTH", "STATE"]);
            for name in &self.0 {
                table.row([(*name).to_owned(), name.len().to_string(), Ink::Bad.on("bad")]);
            }
            page.table(table);
        }
    }

    fn drawn(format: Format, colour: bool) -> String {
        render(&Names(vec!["a", "häagen", ""]), format, Timestamp::UNIX_EPOCH, colour).unwrap()
    }

    #[test]
    fn colour_does_not_move_columns_and_nothing_trails() {
        assert_eq!(drawn(Format::Table, false), "NAME    STATE\na       bad\nhäagen  bad\n-       bad\n");
        let without_codes = drawn(Format::Table, true).replace("\u{1b}[1;31m", "").replace("\u{1b}[0m", "");
        assert_eq!(without_codes, drawn(Format::Table, false));
    }

    #[test]
    fn a_wide_page_has_more_columns() {
        assert_eq!(
            drawn(Format::Wide, false),
            "NAME    LENGTH  STATE\na            1  bad\nhäagen       7  bad\n-            0  bad\n"
        );
    }
}
