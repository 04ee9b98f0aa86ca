//! Context files: read with care for the key inside, written for their owner only.

use std::io::Write;
use std::path::Path;

use super::{Context, ContextError};

/// A context file, read and checked.
pub fn read_file(path: &Path) -> Result<Context, ContextError> {
    let text = std::fs::read_to_string(path).map_err(|source| ContextError::File {
        operation: "read context",
        path: path.to_owned(),
        source,
    })?;
    // The parser's message can quote what it met, and a context holds a key: only the place is told.
    let context: Context = serde_yaml_ng::from_str(&text).map_err(|error| ContextError::Syntax {
        path: path.to_owned(),
        what: "a context file",
        reason: match error.location() {
            Some(at) => format!(
                "line {}, column {} (fields: controller, server_name, authorities, certificate, key)",
                at.line(),
                at.column()
            ),
            None => "fields are controller, server_name, authorities, certificate, key".to_owned(),
        },
    })?;
    context.validate(&path.display().to_string())?;
    Ok(context)
}

pub(super) fn to_yaml(context: &Context, path: &Path) -> Result<String, ContextError> {
    serde_yaml_ng::to_string(context).map_err(|error| ContextError::Syntax {
        path: path.to_owned(),
        what: "a context",
        reason: error.to_string(),
    })
}

/// Whether anybody but its owner may read the file.
pub fn is_exposed(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// Writes beside, makes durable, renames: a crash leaves the old file or the new one. Owner only, folders too.
pub(super) fn write_private(path: &Path, text: &str) -> Result<(), ContextError> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |operation| {
        let path = path.to_owned();
        move |source| ContextError::File { operation, path, source }
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed("make the folder of"))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed("write"))?;
    file.write_all(text.as_bytes()).and_then(|()| file.as_file().sync_all()).map_err(failed("write"))?;
    file.persist(path).map_err(|error| error.error).map_err(failed("write"))?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("make durable"))
}
