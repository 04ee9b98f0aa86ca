//! Who may join, and who may do what: tokens, foreign certificates, roles, and what operators may type.

use std::time::Duration;

use walfleet_integration_tests::fleet::{Controller, Ctl, Fleet};
use walfleet_integration_tests::os_user::os_user;
use walfleet_integration_tests::scratch::in_scratch;

const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const REFUSED: i32 = 4;
const UNREACHABLE: i32 = 5;

#[test]
fn a_token_admits_one_host_once_and_not_for_long() {
    in_scratch(|scratch| {
        scratch.allow_log("refused to admit a member");
        let fleet = Fleet::start(scratch)?;
        let url = fleet.controller.url();
        let short = fleet.admin.json(&["token", "create", "--role", "agent", "--ttl", "1m"])?;
        let expired_at = std::time::Instant::now() + Duration::from_secs(61);

        let (first, second) = (fleet.agent("first").build()?, fleet.agent("second").build()?);
        let token = fleet.token(&[])?;
        first.join(url, &token)?.ok()?;
        let again = second.join(url, &token)?;
        anyhow::ensure!(again.code == REFUSED, "{again:?}");
        again.says("HINT")?;

        let revoked = fleet.admin.json(&["token", "create", "--role", "agent"])?;
        let text = |token: &serde_json::Value, field: &str| token[field].as_str().unwrap_or_default().to_owned();
        fleet.admin.run(&["token", "revoke", &text(&revoked, "id")])?.ok()?;
        second.join(url, &text(&revoked, "token"))?.exit(REFUSED)?;
        second.join(url, "wft_nonsense")?.exit(USAGE)?.says("token")?;
        let forged = token.replacen(|c: char| c.is_ascii_digit(), "x", 3);
        anyhow::ensure!(second.join(url, &forged)?.code != 0);

        std::thread::sleep(expired_at.saturating_duration_since(std::time::Instant::now()));
        second.join(url, &text(&short, "token"))?.exit(REFUSED)?.says("expired")?;
        // And the host is none the worse for it.
        second.join(url, &fleet.token(&[])?)?.ok()?;
        Ok(())
    });
}

#[test]
fn another_fleets_certificates_open_nothing() {
    in_scratch(|scratch| {
        let fleet = Fleet::start(scratch)?;
        let elsewhere_scratch = walfleet_integration_tests::scratch::Scratch::new()?;
        let elsewhere = Fleet::start(&elsewhere_scratch)?;
        // An operator of one fleet, talking to the other's controller.
        let context = std::fs::read_to_string(elsewhere.admin.context())?;
        let crossed = scratch.join("crossed.yaml");
        os_user().write(&crossed, context.replace(elsewhere.controller.url(), fleet.controller.url()))?;
        std::fs::set_permissions(&crossed, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let crossed = Ctl::new(&crossed)?.run(&["status"])?;
        anyhow::ensure!(crossed.code == UNREACHABLE || crossed.code == REFUSED, "{crossed:?}");
        anyhow::ensure!(crossed.stderr.contains("certificate"), "{crossed:?}");
        // The same, with this fleet's authorities put in: the controller itself must refuse.
        let own = std::fs::read_to_string(fleet.admin.context())?;
        let mixed = mixed_context(&own, &context);
        let file = scratch.join("mixed.yaml");
        os_user().write(&file, mixed)?;
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        let mixed = Ctl::new(&file)?.run(&["status"])?;
        anyhow::ensure!(mixed.code == UNREACHABLE || mixed.code == REFUSED, "{mixed:?}");
        Ok(())
    });
}

/// The URL and authorities of one context, the certificate and key of another.
fn mixed_context(own: &str, foreign: &str) -> String {
    let part = |text: &str, from: &str, to: Option<&str>| {
        let start = text.find(from).unwrap_or_default();
        let end = to.and_then(|to| text.find(to)).unwrap_or(text.len());
        text.get(start..end).unwrap_or_default().to_owned()
    };
    part(own, "controller:", Some("certificate:")) + &part(foreign, "certificate:", None)
}

#[test]
fn roles_bound_what_an_operator_may_do() {
    in_scratch(|scratch| {
        let fleet = Fleet::start(scratch)?;
        let viewer = fleet.operator("vera", "viewer")?;
        let operator = fleet.operator("otto", "operator")?;
        let file = scratch.join("policy.yaml");
        os_user()
            .write(&file, "apiVersion: walfleet/v1\nkind: Repository\nname: r\nspec: { url: 'file:///srv/r' }\n")?;
        let apply = ["apply", "-f", &file.to_string_lossy()].map(str::to_owned);
        let apply: Vec<&str> = apply.iter().map(String::as_str).collect();
        for (who, words, code) in [
            (&viewer, vec!["status"], 0),
            (&viewer, vec!["cluster", "list"], 0),
            (&viewer, vec!["backup", "start", "orders"], REFUSED),
            (&viewer, vec!["token", "create", "--role", "agent"], REFUSED),
            (&viewer, apply.clone(), REFUSED),
            (&operator, vec!["status"], 0),
            (&operator, vec!["backup", "start", "orders"], NOT_FOUND),
            (&operator, vec!["token", "create", "--role", "admin"], REFUSED),
            (&operator, apply, REFUSED),
        ] {
            who.run(&words)?.exit(code)?;
        }
        Ok(())
    });
}

#[test]
fn what_operators_mistype_is_named() {
    in_scratch(|scratch| {
        let mut fleet = Fleet::start(scratch)?;
        let apply = |yaml: &str| {
            let file = scratch.join("typed.yaml");
            os_user().write(&file, yaml)?;
            fleet.admin.run(&["apply", "-f", &file.to_string_lossy()])
        };
        let policy = |spec: &str| format!("apiVersion: walfleet/v1\nkind: Policy\nname: p\nspec: {{ {spec} }}\n");
        for (yaml, says) in [
            ("kind: [".to_owned(), "line"),
            (policy("selector: '', repository: absent"), "absent"),
            (policy("selector: '', repository: absent, backup: { compression_level: 99 }"), "backup.compression_level"),
            (policy("selector: '', repository: absent, backup: { schedule: 'every day' }"), "backup.schedule"),
            (policy("selector: '', repository: absent, backup: { time_zone: 'Mars/Olympus' }"), "time_zone"),
            (policy("selector: 'env in (', repository: absent"), "selector"),
            (policy("selector: '', repository: absent, retenshun: 1"), "retenshun"),
            ("apiVersion: walfleet/v1\nkind: Policie\nname: p\nspec: {}\n".to_owned(), "Policie"),
        ] {
            let output = apply(&yaml)?.exit(USAGE)?;
            anyhow::ensure!(output.stderr.contains(says), "{yaml}: does not say \"{says}\":\n{}", output.stderr);
        }
        let restore = ["restore", "start", "orders", "--on", "db1", "--data-dir", "/srv/x"];
        let restore = |more: &[&str]| fleet.admin.run(&[&restore[..], more].concat());
        restore(&["--to", "2026-06-04 14:31:59"])?.exit(USAGE)?.says("has no time zone")?.says("UTC")?;
        restore(&["--to", "2026-06-04 14:31:59 XYZ"])?.exit(USAGE)?;
        restore(&["--latest"])?.exit(NOT_FOUND)?.says("orders")?;
        fleet.admin.run(&["job", "show", "job_nonsense"])?.exit(NOT_FOUND)?;
        fleet.admin.run(&["cluster", "show", "nowhere"])?.exit(NOT_FOUND)?;
        fleet.admin.run(&["nonsense"])?.exit(USAGE)?;
        fleet.controller.stop()?;
        fleet.admin.run(&["status"])?.exit(UNREACHABLE)?.says("HINT")?;
        Ok(())
    });
}

#[test]
fn an_authority_is_never_replaced() {
    in_scratch(|scratch| {
        let controller = Controller::init(scratch)?;
        let key = std::fs::read(controller.recovery_key())?;
        anyhow::ensure!(Controller::init(scratch).is_err(), "init ran again over a controller");
        assert_eq!(std::fs::read(controller.recovery_key())?, key);
        Ok(())
    });
}
