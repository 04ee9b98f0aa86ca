//! Handing a restored data directory over to PostgreSQL's recovery: settings, signal file, label, tablespace map.
//!
//! Builds texts; writes nothing itself. From PostgreSQL 12 on, recovery is configured by ordinary settings and begun by
//! `recovery.signal` (src/backend/access/transam/xlogrecovery.c); all supported versions agree on the names used here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use walfleet_repository::postgres::{Lsn, Timeline};

use crate::jobs::order::{RecoveryTarget, TargetAction, TargetPoint};

/// Settings of postgresql.auto.conf that a restore replaces: everything that steers recovery. What is left of them in the
/// source's postgresql.conf is overruled by writing every one of them: a target or a delay inherited from an old recovery
/// would stop the restore short, or hold it up, without a word.
const REPLACED: &[&str] = &[
    "restore_command",
    "archive_cleanup_command",
    "recovery_end_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "recovery_min_apply_delay",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "data_directory",
];

/// What recovery of one restore needs to be told.
#[derive(Clone, Debug)]
pub struct RecoverySettings<'a> {
    pub target: &'a RecoveryTarget,
    /// The timeline to follow, always by number: "latest" would be asked of the archive again at every start.
    pub timeline: Timeline,
    /// PostgreSQL's major version.
    pub major: u32,
    /// Full path of walfleet-agent.
    pub program: &'a Path,
    pub keep_archiving: bool,
    pub port: Option<u16>,
    /// Settings that recovery needs at least this large (pg_control's copies of the source's).
    pub minimums: &'a [(String, u32)],
    /// Sockets are made here instead.
    pub socket_dir: Option<PathBuf>,
}

impl RecoverySettings<'_> {
    /// The new postgresql.auto.conf: what the source had, less what steers recovery, and ours at the end, where it wins.
    ///
    /// Bytes, since a setting may be in any encoding.
    pub fn auto_conf(&self, source: &[u8]) -> Vec<u8> {
        const HEADING: &[u8] = b"# walfleet restore";
        let mut text = Vec::new();
        for line in source.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let name = line.split(|byte| b"= \t".contains(byte)).next().unwrap_or_default().to_ascii_lowercase();
            if !REPLACED.iter().any(|replaced| replaced.as_bytes() == name) && !line.starts_with(HEADING) {
                text.extend_from_slice(line);
                text.push(b'\n');
            }
        }
        text.extend_from_slice(HEADING);
        text.push(b'\n');
        for (name, value) in self.settings() {
            text.extend_from_slice(format!("{name} = {}\n", quote(&value)).as_bytes());
        }
        text
    }

    /// Name and value, in the order written.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let program = shell_quote(&self.program.to_string_lossy());
        let mut settings = vec![
            ("restore_command", format!("{program} wal fetch --source {} %f %p", crate::wal::fetch::SOURCE_FILE)),
            ("recovery_end_command", format!("rm -rf {}", crate::wal::fetch::AHEAD_FOLDER)),
            ("recovery_target_timeline", self.timeline.to_string()),
            // So that it can be asked where it stands.
            ("hot_standby", "on".to_owned()),
            ("recovery_target_action", action(self.target.action).to_owned()),
            ("recovery_target_inclusive", if self.target.exclusive { "off" } else { "on" }.to_owned()),
            ("recovery_min_apply_delay", "0".to_owned()),
            ("archive_cleanup_command", String::new()),
            ("primary_conninfo", String::new()),
            ("primary_slot_name", String::new()),
            // Nobody follows it yet: with the original's standbys its first commit would wait for ever.
            ("synchronous_standby_names", String::new()),
        ];
        if self.major < 16 {
            // Gone with 16, which refuses unknown names. A file that lies there would end a pause at once.
            settings.push(("promote_trigger_file", String::new()));
        }
        // Targets exclude each other, and an empty one is none (check_recovery_target_…, xlogrecovery.c).
        let target = self.point();
        const TARGETS: [&str; 5] = [
            "recovery_target",
            "recovery_target_lsn",
            "recovery_target_name",
            "recovery_target_time",
            "recovery_target_xid",
        ];
        let others = TARGETS.into_iter().filter(|name| target.as_ref().is_none_or(|(used, _)| used != name));
        settings.extend(others.map(|name| (name, String::new())));
        settings.extend(target);
        if !self.keep_archiving {
            // The copy begins a timeline of its own: it must not write into the archive of the original.
            settings.push(("archive_mode", "off".to_owned()));
        }
        if let Some(port) = self.port {
            settings.push(("port", port.to_string()));
        }
        if let Some(folder) = &self.socket_dir {
            settings.push(("unix_socket_directories", folder.to_string_lossy().into_owned()));
        }
        settings
    }

    fn point(&self) -> Option<(&'static str, String)> {
        match &self.target.point {
            TargetPoint::Time(at) => Some(("recovery_target_time", postgres_time(*at))),
            TargetPoint::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
            // Records hold the low 32 bits; recovery compares those (recoveryStopsBefore, xlogrecovery.c).
            TargetPoint::Xid(xid) => Some(("recovery_target_xid", (xid & 0xFFFF_FFFF).to_string())),
            TargetPoint::Name(name) => Some(("recovery_target_name", name.clone())),
            TargetPoint::Immediate => Some(("recovery_target", "immediate".to_owned())),
            TargetPoint::Latest => None,
        }
    }

    /// For a source whose configuration lies outside its data directory (Debian's /etc/postgresql): enough to start.
    pub fn minimal_conf(&self) -> String {
        let mut text = String::from(
            "# Written by walfleet restore: the source's postgresql.conf lies outside its data directory.\n\
             # These are the settings that recovery needs to be as large as at the source.\n",
        );
        for (name, value) in self.minimums {
            let _ = writeln!(text, "{name} = {value}");
        }
        text.push_str("listen_addresses = ''\n");
        text
    }
}

/// A postgresql.conf whose `data_directory` is commented out, if it had one: it names the source's, and whoever started the
/// copy would start the original, or nothing (SelectConfigFiles, src/backend/utils/misc/guc.c).
pub fn without_data_directory(conf: &[u8]) -> Option<Vec<u8>> {
    const NAME: &[u8] = b"data_directory";
    let names_it = |line: &[u8]| {
        let line = line.trim_ascii_start();
        let (name, rest) = line.split_at_checked(NAME.len()).unwrap_or((line, b""));
        name.eq_ignore_ascii_case(NAME) && rest.first().is_some_and(|byte| b"= \t".contains(byte))
    };
    let lines: Vec<&[u8]> = conf.split(|byte| *byte == b'\n').collect();
    lines.iter().any(|line| names_it(line)).then(|| {
        let kept = lines.iter().map(|line| if names_it(line) { [b"#", *line].concat() } else { line.to_vec() });
        kept.collect::<Vec<_>>().join(&b'\n')
    })
}

/// For a source whose pg_hba.conf lies outside: the operating system's users may connect as themselves.
pub const MINIMAL_HBA: &str =
    "# Written by walfleet restore: the source's pg_hba.conf lies outside its data directory.\nlocal all all peer\n";

fn action(action: TargetAction) -> &'static str {
    match action {
        TargetAction::Promote => "promote",
        TargetAction::Pause => "pause",
        TargetAction::Shutdown => "shutdown",
    }
}

/// With microseconds and an explicit zone, so that no server setting can read it otherwise.
fn postgres_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string()
}

/// As the configuration file's reader unquotes it (GUC_scanstr, src/backend/utils/misc/guc-file.l).
fn quote(value: &str) -> String {
    let mut text = String::from("'");
    for c in value.chars() {
        match c {
            '\'' => text.push_str("''"),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            _ => text.push(c),
        }
    }
    text.push('\'');
    text
}

/// For /bin/sh, and with % doubled for restore_command's own placeholders.
fn shell_quote(path: &str) -> String {
    let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+".contains(&b));
    let quoted = if plain { path.to_owned() } else { format!("'{}'", path.replace('\'', "'\\''")) };
    quoted.replace('%', "%%")
}

/// The tablespace map with new locations: lines of "oid path", in which backslashes and newlines are escaped
/// (do_pg_backup_start, src/backend/access/transam/xlog.c).
pub fn tablespace_map(original: &str, locations: &BTreeMap<u32, PathBuf>) -> String {
    let mut text = String::new();
    for line in original.lines() {
        let oid = line.split(' ').next().and_then(|oid| oid.parse::<u32>().ok());
        match oid.and_then(|oid| locations.get(&oid).map(|path| (oid, path))) {
            Some((oid, path)) => {
                let path = path.to_string_lossy().replace('\\', "\\\\").replace('\n', "\\\n").replace('\r', "\\\r");
                let _ = writeln!(text, "{oid} {path}");
            }
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// What the operator should know beforehand, in a line.
pub fn describe(target: &RecoveryTarget, lsn_hint: Option<Lsn>) -> String {
    let at = match &target.point {
        TargetPoint::Time(at) => postgres_time(*at),
        TargetPoint::Lsn(lsn) => lsn.to_string(),
        TargetPoint::Xid(xid) => format!("transaction {xid}"),
        TargetPoint::Name(name) => format!("restore point \"{name}\""),
        TargetPoint::Immediate => "the end of the backup".to_owned(),
        TargetPoint::Latest => "the end of the WAL in the repository".to_owned(),
    };
    match lsn_hint {
        Some(lsn) => format!("{at} (WAL up to {lsn})"),
        None => at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::order::TargetTimeline;

    fn target(point: TargetPoint, exclusive: bool) -> RecoveryTarget {
        RecoveryTarget { point, exclusive, timeline: TargetTimeline::Latest, action: TargetAction::Promote }
    }

    fn settings(target: &RecoveryTarget) -> RecoverySettings<'_> {
        RecoverySettings {
            target,
            timeline: Timeline(3),
            major: 18,
            program: Path::new("/opt/wal fleet/walfleet-agent"),
            keep_archiving: false,
            port: Some(5433),
            minimums: &[],
            socket_dir: None,
        }
    }

    fn written(target: &RecoveryTarget, source: &str) -> String {
        String::from_utf8(settings(target).auto_conf(source.as_bytes())).unwrap()
    }

    #[test]
    fn each_target_becomes_the_settings_that_recovery_reads() {
        let at: Timestamp = "2026-06-04T14:31:59.25Z".parse().unwrap();
        for (point, exclusive, wanted) in [
            (TargetPoint::Time(at), false, "recovery_target_time = '2026-06-04 14:31:59.250000+00'"),
            (TargetPoint::Lsn(Lsn(0x300_0060)), true, "recovery_target_lsn = '0/3000060'"),
            (TargetPoint::Xid(0x1_0000_02E6), false, "recovery_target_xid = '742'"),
            (TargetPoint::Name("it's".into()), false, "recovery_target_name = 'it''s'"),
            (TargetPoint::Immediate, false, "recovery_target = 'immediate'"),
        ] {
            let target = target(point, exclusive);
            let text = written(&target, "");
            assert!(text.contains(wanted), "{text}");
            assert_eq!(text.matches("recovery_target_inclusive = 'off'").count(), usize::from(exclusive));
            assert_eq!(text.matches(" = ''\n").count(), 4 + 4, "all other targets are none: {text}");
            assert!(text.contains("synchronous_standby_names = ''"), "its commits wait for nobody: {text}");
            assert!(text.contains("recovery_target_action = 'promote'") && text.contains("archive_mode = 'off'"));
            assert!(text.contains("restore_command = '''/opt/wal fleet/walfleet-agent'' wal fetch --source"), "{text}");
        }
    }

    #[test]
    fn what_steered_the_sources_recovery_is_gone_and_everything_else_stays() {
        let target = target(TargetPoint::Latest, false);
        let source =
            "# comment\nwork_mem = '64MB'\nrecovery_target_time = 'x'\nprimary_conninfo='y'\narchive_mode = 'on'\n";
        let text = written(&target, source);
        assert!(text.starts_with("# comment\nwork_mem = '64MB'\narchive_mode = 'on'\n# walfleet restore\n"), "{text}");
        assert!(text.contains("primary_conninfo = ''") && text.contains("recovery_target_time = ''"), "{text}");
        assert!(!text.contains("'x'") && !text.contains("'y'"));
        assert!(text.rfind("archive_mode = 'off'") > text.rfind("archive_mode = 'on'"), "the last one wins");
        let twice = written(&target, &text);
        assert_eq!(twice.matches("restore_command").count(), 1);
    }

    #[test]
    fn a_trigger_file_is_named_only_to_versions_that_know_it() {
        let target = target(TargetPoint::Immediate, false);
        let named = |major| {
            let settings = RecoverySettings { major, ..settings(&target) };
            settings.settings().iter().any(|(name, _)| *name == "promote_trigger_file")
        };
        assert!(named(15) && !named(16));
    }

    #[test]
    fn the_sources_data_directory_is_commented_out_and_nothing_else_changes() {
        let conf = b"port = 1\n Data_Directory='/source' # x\ndata_directory_mode = 1\n#data_directory = 'y'\n";
        let text = without_data_directory(conf).unwrap();
        let expected = b"port = 1\n# Data_Directory='/source' # x\ndata_directory_mode = 1\n#data_directory = 'y'\n";
        assert_eq!(text, expected);
        assert_eq!(without_data_directory(&text), None);
    }

    #[test]
    fn the_tablespace_map_gets_the_new_locations() {
        let locations = BTreeMap::from([(16400, PathBuf::from("/new one"))]);
        assert_eq!(tablespace_map("16400 /old\n16401 /kept\n", &locations), "16400 /new one\n16401 /kept\n");
    }
}
