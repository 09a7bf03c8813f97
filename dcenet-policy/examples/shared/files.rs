//! Objects of Kubernetes from files.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use dcenet_policy::model::Time;
use dcenet_policy::sources::kubernetes::{Documents, Note, NoteKind};

/// All objects of a directory, with those below it, or of a single file.
pub(crate) fn read(resources: &Path) -> Result<(Documents, Vec<Note>), Box<dyn Error>> {
    let (texts, notes) = texts(resources)?;
    let mut documents = Documents::default();
    for (path, text) in texts {
        let name = path.display().to_string();
        documents = if is_of(&path, &["json"]) {
            documents.with_json(&name, &text)?
        } else {
            documents.with_yaml(&name, &text)?
        };
    }
    Ok((documents, notes))
}

/// Files and what is in them.
type Texts = Vec<(PathBuf, String)>;

/// The texts of all files of a directory, with those below it, or of a single file, in the order of their paths.
pub(crate) fn texts(resources: &Path) -> Result<(Texts, Vec<Note>), Box<dyn Error>> {
    let (mut files, mut notes) = (Vec::new(), Vec::new());
    if resources.is_dir() {
        find(resources, &mut files, &mut notes)?;
        files.sort();
        notes.sort_by(|left, right| left.text.cmp(&right.text));
        if files.is_empty() {
            return Err(format!("{}: no file .yaml, .yml or .json is here", resources.display()).into());
        }
    } else {
        files.push(resources.to_owned());
    }
    let mut texts = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let text = text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned);
        texts.push((path, text));
    }
    Ok((texts, notes))
}

/// What the host's clock says.
pub(crate) fn now() -> Option<Time> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok();
    since.and_then(|since| Time::try_from(since.as_secs()).ok())
}

fn is_of(path: &Path, extensions: &[&str]) -> bool {
    path.extension().is_some_and(|found| extensions.iter().any(|known| found.eq_ignore_ascii_case(known)))
}

fn find(directory: &Path, files: &mut Vec<PathBuf>, notes: &mut Vec<Note>) -> Result<(), String> {
    let failed = |path: &Path, error: io::Error| format!("{}: {error}", path.display());
    for entry in std::fs::read_dir(directory).map_err(|error| failed(directory, error))? {
        let entry = entry.map_err(|error| failed(directory, error))?;
        let path = entry.path();
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let kind = entry.file_type().map_err(|error| failed(&path, error))?;
        let mut not_read = |reason: &str| {
            notes.push(Note { kind: NoteKind::NotRead, text: format!("not read: {}: {reason}", path.display()) });
        };
        if kind.is_dir() {
            find(&path, files, notes)?;
        } else if kind.is_symlink() && path.is_dir() {
            // It may lead round in a circle.
            not_read("a link to a directory is not followed; give the directory itself");
        } else if is_of(&path, &["yaml", "yml", "json"]) {
            let target = std::fs::metadata(&path).map_err(|error| failed(&path, error))?;
            if target.is_file() {
                files.push(path);
            } else {
                not_read("it is no regular file");
            }
        }
    }
    Ok(())
}
