//! How two versions of a document differ, field by field, for people to read before they apply.

use std::collections::{BTreeMap, BTreeSet};

use serde_yaml_ng::Value;

use super::document::Document;

/// One field that is not as it was. Both sides as YAML; empty: absent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FieldChange {
    /// Dotted, list items as `members[0]`.
    pub path: String,
    pub before: String,
    pub after: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChangeKind {
    Created,
    Updated,
    Unchanged,
}

/// The changes from `before` (absent: it is new) to `after`. Defaults count as written out, so that declaring a
/// default is no change.
pub fn changes(before: Option<&Document>, after: &Document) -> (ChangeKind, Vec<FieldChange>) {
    let old = before.map(fields).unwrap_or_default();
    let new = fields(after);
    let paths: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let text = |side: &BTreeMap<String, String>, path: &String| side.get(path).cloned().unwrap_or_default();
    let changed: Vec<FieldChange> = paths
        .into_iter()
        .filter(|path| old.get(*path) != new.get(*path))
        .map(|path| FieldChange { path: path.clone(), before: text(&old, path), after: text(&new, path) })
        .collect();
    let kind = match before {
        None => ChangeKind::Created,
        Some(_) if changed.is_empty() => ChangeKind::Unchanged,
        Some(_) => ChangeKind::Updated,
    };
    (kind, changed)
}

/// The leaves below `labels` and `spec`.
fn fields(document: &Document) -> BTreeMap<String, String> {
    let mut leaves = BTreeMap::new();
    // What a document prints always reads back (a test holds it to that).
    if let Ok(Value::Mapping(whole)) = serde_yaml_ng::from_str(&document.to_yaml()) {
        for section in ["labels", "spec"] {
            if let Some(value) = whole.get(section) {
                collect(section.to_owned(), value, &mut leaves);
            }
        }
    }
    leaves
}

fn collect(path: String, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        // An empty section says no more than an absent one; an empty list does (`members: []` admits nobody).
        Value::Mapping(map) => {
            for (key, inner) in map {
                collect(format!("{path}.{}", scalar(key)), inner, leaves);
            }
        }
        Value::Sequence(list) if !list.is_empty() => {
            for (i, inner) in list.iter().enumerate() {
                collect(format!("{path}[{i}]"), inner, leaves);
            }
        }
        leaf => {
            leaves.insert(path, scalar(leaf));
        }
    }
}

fn scalar(value: &Value) -> String {
    serde_yaml_ng::to_string(value).unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::document::parse;
    use super::*;

    fn policy(spec: &str) -> Document {
        parse(&format!("apiVersion: walfleet/v1\nkind: Policy\nname: gold\nspec: {{repository: main, {spec}}}"))
            .expect(spec)
            .remove(0)
    }

    #[test]
    fn only_what_differs_is_shown_and_a_declared_default_is_no_change() {
        let before = policy("selector: env=prod, backup: {schedule: '0 2 * * *'}");
        let same = policy("selector: 'env == prod', backup: {schedule: '0 2 * * *', prefer: standby, time_zone: UTC}");
        assert_eq!(changes(Some(&before), &same), (ChangeKind::Unchanged, vec![]));

        let after = policy("selector: env=prod, backup: {schedule: '0 3 * * *'}, objectives: {rpo: 60s}");
        let (kind, fields) = changes(Some(&before), &after);
        assert_eq!(kind, ChangeKind::Updated);
        let shown: Vec<_> = fields.iter().map(|f| (f.path.as_str(), f.before.as_str(), f.after.as_str())).collect();
        assert_eq!(shown, [("spec.backup.schedule", "0 2 * * *", "0 3 * * *"), ("spec.objectives.rpo", "", "1m")]);
        assert_eq!(changes(None, &after).0, ChangeKind::Created);
    }
}
