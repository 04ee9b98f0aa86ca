//! Which policy binds which cluster: by labels, exactly one, decided anew each time. Pure.

use std::collections::BTreeMap;

use crate::resources::{Labels, PolicySpec};

/// The label every cluster and agent has, whatever else it is called: its own name.
pub const NAME_LABEL: &str = "name";

/// How one cluster is bound.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Binding<'a> {
    /// No policy selects it: nothing is scheduled, and it is shown.
    Unbound,
    To(&'a str),
    /// Several select it, in order of their names. Applying such documents is refused; it can still come about when a
    /// cluster is discovered or an agent's labels change. Then none applies, and it is shown.
    Tied(Vec<&'a str>),
}

impl<'a> Binding<'a> {
    pub fn policy(&self) -> Option<&'a str> {
        match self {
            Binding::To(policy) => Some(policy),
            Binding::Unbound | Binding::Tied(_) => None,
        }
    }
}

/// Binds a cluster with these labels (its name among them, see [`with_name`]).
pub fn bind<'a>(labels: &Labels, policies: &'a BTreeMap<String, PolicySpec>) -> Binding<'a> {
    let mut selecting =
        policies.iter().filter(|(_, spec)| spec.selector.matches(labels)).map(|(name, _)| name.as_str());
    match (selecting.next(), selecting.next()) {
        (None, _) => Binding::Unbound,
        (Some(only), None) => Binding::To(only),
        (Some(first), Some(second)) => Binding::Tied([first, second].into_iter().chain(selecting).collect()),
    }
}

/// The labels that selectors see: those given, and the name, which nobody can give away.
pub fn with_name(name: &str, labels: &Labels) -> Labels {
    let mut all = labels.clone();
    all.insert(NAME_LABEL.to_owned(), name.to_owned());
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{Document, document};

    fn policies(selectors: &[(&str, &str)]) -> BTreeMap<String, PolicySpec> {
        selectors
            .iter()
            .map(|(name, selector)| {
                let text = format!(
                    "apiVersion: walfleet/v1\nkind: Policy\nname: {name}\nspec: {{selector: '{selector}', repository: main}}"
                );
                match document::parse(&text).expect("good").remove(0) {
                    Document::Policy(policy) => (policy.name, policy.spec),
                    other => panic!("{other:?} is no policy"),
                }
            })
            .collect()
    }

    #[test]
    fn one_policy_binds_several_tie_and_none_leaves_it_unbound() {
        let labels = with_name("orders", &Labels::from([("env".to_owned(), "prod".to_owned())]));
        let table = [
            (vec![("a", "env=prod"), ("b", "env=test")], Binding::To("a")),
            (vec![("a", "env=test")], Binding::Unbound),
            (vec![("z", "env=prod"), ("a", ""), ("m", "!env")], Binding::Tied(vec!["a", "z"])),
            (vec![("a", "name=orders")], Binding::To("a")),
            (vec![("a", "env=prod,name!=orders"), ("b", "name=orders")], Binding::To("b")),
        ];
        for (declared, expected) in table {
            let declared = policies(&declared);
            assert_eq!(bind(&labels, &declared), expected);
        }
    }

    #[test]
    fn no_label_can_pass_for_another_name() {
        let labels = with_name("orders", &Labels::from([("name".to_owned(), "payments".to_owned())]));
        assert_eq!(labels["name"], "orders");
    }
}
