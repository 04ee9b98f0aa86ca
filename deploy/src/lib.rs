//! What an installation needs beside the binaries: systemd units and sample configurations, as they lie in this folder.
//!
//! Packages and installers take them from here, so that nothing is shipped that no test has read: the sample
//! configurations are parsed, option by option, by the tests of the program that reads them.

/// A file of an installation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shipped {
    /// In this folder, or in docs/.
    pub name: &'static str,
    /// Where it belongs on a host (FHS 3.0; units as systemd.unit(5) has them).
    pub path: &'static str,
    pub content: &'static str,
}

/// Everything that is shipped.
pub const FILES: &[Shipped] = &[
    Shipped { name: "agent.yaml", path: "/etc/walfleet/agent.yaml", content: include_str!("../agent.yaml") },
    Shipped {
        name: "controller.yaml",
        path: "/etc/walfleet/controller.yaml",
        content: include_str!("../controller.yaml"),
    },
    // The units name these two; they lie in docs/.
    Shipped {
        name: "operation.md",
        path: "/usr/share/doc/walfleet/operation.md",
        content: include_str!("../../docs/operation.md"),
    },
    Shipped {
        name: "command-line.md",
        path: "/usr/share/doc/walfleet/command-line.md",
        content: include_str!("../../docs/command-line.md"),
    },
    Shipped { name: "fleet.yaml", path: "/usr/share/doc/walfleet/fleet.yaml", content: include_str!("../fleet.yaml") },
    Shipped {
        name: "walfleet-agent.service",
        path: "/usr/lib/systemd/system/walfleet-agent.service",
        content: include_str!("../walfleet-agent.service"),
    },
    Shipped {
        name: "walfleet-controller.service",
        path: "/usr/lib/systemd/system/walfleet-controller.service",
        content: include_str!("../walfleet-controller.service"),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_this_folder_is_forgotten() {
        let folder = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap();
        let found = folder.map(|entry| entry.unwrap()).filter(|entry| entry.file_type().unwrap().is_file());
        for name in found.map(|entry| entry.file_name().into_string().unwrap()).filter(|name| name != "Cargo.toml") {
            assert!(FILES.iter().any(|file| file.name == name), "{name} is not shipped");
        }
    }

    #[test]
    fn units_start_what_the_samples_configure() {
        for (unit, sample) in
            [("walfleet-agent.service", "agent.yaml"), ("walfleet-controller.service", "controller.yaml")]
        {
            let of = |name: &str| *FILES.iter().find(|file| file.name == name).unwrap();
            assert!(of(unit).content.contains(of(sample).path), "{unit} does not name {}", of(sample).path);
            let documentation = of(unit).content.lines().find_map(|line| line.strip_prefix("Documentation="));
            for named in documentation.unwrap().split(' ') {
                let path = named.strip_prefix("file:").unwrap();
                assert!(FILES.iter().any(|file| file.path == path), "{unit} names {named}, which is not shipped");
            }
            // The documented exit code of wrong usage: otherwise a mistake in a file is tried again for ever.
            assert!(of(unit).content.lines().any(|line| line == "RestartPreventExitStatus=2"), "{unit}");
        }
    }
}
