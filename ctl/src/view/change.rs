//! What applying documents changes, or would.

use serde::Serialize;

use crate::ink::Ink;
use crate::print::{Page, View, count};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    Created,
    Updated,
    Unchanged,
}

#[derive(Clone, Debug, Serialize)]
pub struct Change {
    pub kind: String,
    pub name: String,
    pub change: ChangeKind,
    pub fields: Vec<FieldChange>,
    pub consequences: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct FieldChange {
    pub path: String,
    pub before: Option<String>,
    pub after: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Changes {
    /// False: this is what would happen.
    pub applied: bool,
    pub changes: Vec<Change>,
}

impl Changes {
    pub fn effective(&self) -> usize {
        self.changes.iter().filter(|change| change.change != ChangeKind::Unchanged).count()
    }

    /// Whether something that the fleet already lives by becomes different.
    pub fn touch_existing(&self) -> bool {
        self.changes.iter().any(|change| change.change == ChangeKind::Updated)
    }
}

impl View for Changes {
    fn draw(&self, page: &mut Page) {
        for change in &self.changes {
            change.draw(page);
        }
        let summary = match (self.effective(), self.applied) {
            (0, _) => "nothing to change".to_owned(),
            (number, true) => format!("{} applied", count(number, "change")),
            (number, false) => format!("{} would be applied", count(number, "change")),
        };
        page.line(summary);
    }
}

impl Change {
    fn draw(&self, page: &mut Page) {
        let title = format!("{} {}", self.kind.to_lowercase(), self.name);
        match self.change {
            ChangeKind::Created => page.line(Ink::Good.on(&format!("+ {title}"))),
            ChangeKind::Updated => page.line(Ink::Warn.on(&format!("~ {title}"))),
            ChangeKind::Unchanged => page.line(format!("  {title} (unchanged)")),
        }
        for field in &self.fields {
            field.draw(page);
        }
        for consequence in &self.consequences {
            page.line(format!("    => {consequence}"));
        }
    }
}

impl FieldChange {
    fn draw(&self, page: &mut Page) {
        let short = |value: &Option<String>| value.as_ref().map(|text| text.trim_end().to_owned());
        let (before, after) = (short(&self.before), short(&self.after));
        let long = [&before, &after].into_iter().flatten().any(|text| text.contains('\n'));
        if long {
            page.line(format!("    {}:", self.path));
            for (sign, ink, text) in [("-", Ink::Bad, before), ("+", Ink::Good, after)] {
                for line in text.iter().flat_map(|text| text.lines()) {
                    page.line(ink.on(&format!("    {sign} {line}")));
                }
            }
            return;
        }
        page.line(match (before, after) {
            (Some(before), Some(after)) => format!("    {}: {before} -> {after}", self.path),
            (None, Some(after)) => format!("    {}: {after}", self.path),
            (Some(before), None) => format!("    {}: {before} -> (removed)", self.path),
            (None, None) => format!("    {}", self.path),
        });
    }
}
