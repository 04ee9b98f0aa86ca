//! Label selectors, in the string form that Kubernetes made familiar: `env=prod,tier in (a,b),!legacy`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// All requirements must hold. The empty selector matches everything.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    requirements: Vec<Requirement>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, Vec<String>),
    /// Holds for an absent label too, as in Kubernetes.
    NotIn(String, Vec<String>),
}

#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error(
    "\"{text}\" is not a label selector: {problem}\nHINT: write requirements with commas between: env=prod, tier!=test, region in (eu,us), zone notin (a), backup, !legacy."
)]
pub struct SelectorError {
    text: String,
    problem: String,
}

impl Selector {
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.requirements.iter().all(|requirement| match requirement {
            Requirement::Exists(key) => labels.contains_key(key),
            Requirement::Absent(key) => !labels.contains_key(key),
            Requirement::In(key, values) => labels.get(key).is_some_and(|value| values.contains(value)),
            Requirement::NotIn(key, values) => labels.get(key).is_none_or(|value| !values.contains(value)),
        })
    }

    pub fn matches_everything(&self) -> bool {
        self.requirements.is_empty()
    }
}

/// Keys: 1 to 63 of letters, digits, '-', '_', '.' and '/'.
pub fn is_label_key(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'))
}

/// Values: at most 63 of letters, digits, '-', '_' and '.'; empty is a value.
pub fn is_label_value(text: &str) -> bool {
    text.len() <= 63 && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// Splits at the commas that stand outside parentheses.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let mut parts = Vec::new();
    let (mut inside, mut start) = (false, 0);
    for (at, character) in text.char_indices() {
        match character {
            '(' if inside => return Err("a parenthesis inside parentheses".to_owned()),
            '(' => inside = true,
            ')' if !inside => return Err("a closing parenthesis without its opening one".to_owned()),
            ')' => inside = false,
            ',' if !inside => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("a parenthesis is not closed".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn key(text: &str) -> Result<String, String> {
    let text = text.trim();
    if is_label_key(text) { Ok(text.to_owned()) } else { Err(format!("\"{text}\" is not a label's key")) }
}

fn value(text: &str) -> Result<String, String> {
    let text = text.trim();
    if is_label_value(text) { Ok(text.to_owned()) } else { Err(format!("\"{text}\" is not a label's value")) }
}

/// `key in (a,b)`, `key notin (a,b)`: before the parenthesis stand the key and the word.
fn set(before: &str, list: &str) -> Result<Requirement, String> {
    let list = list.trim_end().strip_suffix(')').ok_or("there is text after a closing parenthesis")?;
    let values = list.split(',').map(value).collect::<Result<Vec<_>, _>>()?;
    let mut words = before.split_whitespace();
    match (words.next(), words.next(), words.next()) {
        (Some(name), Some("in"), None) => Ok(Requirement::In(key(name)?, values)),
        (Some(name), Some("notin"), None) => Ok(Requirement::NotIn(key(name)?, values)),
        _ => Err(format!("before parentheses it wants a key and \"in\" or \"notin\", not \"{}\"", before.trim())),
    }
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    if let Some((before, list)) = text.split_once('(') {
        set(before, list)
    } else if let Some((name, wanted)) = text.split_once("!=") {
        Ok(Requirement::NotIn(key(name)?, vec![value(wanted)?]))
    } else if let Some((name, wanted)) = text.split_once("==").or_else(|| text.split_once('=')) {
        Ok(Requirement::In(key(name)?, vec![value(wanted)?]))
    } else if let Some(name) = text.strip_prefix('!') {
        key(name).map(Requirement::Absent)
    } else {
        key(text).map(Requirement::Exists)
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Selector, SelectorError> {
        if text.trim().is_empty() {
            return Ok(Selector::default());
        }
        split(text)
            .and_then(|parts| parts.into_iter().map(requirement).collect())
            .map(|requirements| Selector { requirements })
            .map_err(|problem| SelectorError { text: text.to_owned(), problem })
    }
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;

    fn try_from(text: String) -> Result<Selector, SelectorError> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> String {
        selector.to_string()
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, requirement) in self.requirements.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            match requirement {
                Requirement::Exists(key) => f.write_str(key)?,
                Requirement::Absent(key) => write!(f, "!{key}")?,
                Requirement::In(key, values) if values.len() == 1 => write!(f, "{key}={}", values.concat())?,
                Requirement::NotIn(key, values) if values.len() == 1 => write!(f, "{key}!={}", values.concat())?,
                Requirement::In(key, values) => write!(f, "{key} in ({})", values.join(","))?,
                Requirement::NotIn(key, values) => write!(f, "{key} notin ({})", values.join(","))?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        text.split_whitespace()
            .filter_map(|pair| pair.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    #[test]
    fn a_selector_matches_what_kubernetes_would() {
        let table = [
            ("", "", true),
            ("env=prod", "env=prod tier=a", true),
            ("env == prod", "env=prod", true),
            ("env=prod", "env=test", false),
            ("env=prod", "", false),
            ("env!=prod", "env=test", true),
            ("env!=prod", "", true),
            ("tier in (a, b)", "tier=b", true),
            ("tier in (a,b)", "tier=c", false),
            ("tier in (a,b)", "", false),
            ("tier notin (a,b)", "tier=c", true),
            ("tier notin (a,b)", "", true),
            ("tier notin (a,b)", "tier=a", false),
            ("gold", "gold=", true),
            ("gold", "", false),
            ("!gold", "", true),
            ("! gold", "gold=1", false),
            ("env=prod,tier in (a,b),!x", "env=prod tier=a", true),
            ("env=prod,tier in (a,b),!x", "env=prod tier=a x=1", false),
            ("empty=", "empty=", true),
        ];
        for (selector, on, matches) in table {
            let parsed: Selector = selector.parse().expect(selector);
            assert_eq!(parsed.matches(&labels(on)), matches, "{selector} on {on}");
            assert_eq!(parsed.to_string().parse::<Selector>().as_ref(), Ok(&parsed), "{selector} reads back");
        }
    }

    #[test]
    fn malformed_selectors_say_what_is_wrong() {
        for (bad, says) in [
            ("env=prod,", "not a label's key"),
            ("tier in (a", "not closed"),
            ("tier in a)", "without its opening"),
            ("tier within (a)", "\"in\" or \"notin\""),
            ("tier in (a) b", "after a closing"),
            ("tier in ((a))", "inside parentheses"),
            ("a=b=c", "not a label's value"),
            ("é=1", "not a label's key"),
        ] {
            let error = bad.parse::<Selector>().expect_err(bad).to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }
}
