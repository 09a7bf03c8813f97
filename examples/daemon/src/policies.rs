//! Policies in a directory, and its changes; what is known of the cluster beside them, in another.
//!
//! Where issuers are trusted, the directory of policies has bundles and nothing else. Namespaces, pods, nodes and services, which say
//! whom signed rules mean, are told by whoever may write the cluster's directory, and that says nothing that policies say.
//!
//! A change counts when it is whole: a file that was closed after writing, renamed into the directory, or removed. Files
//! that are replaced by a rename are never seen half-written; the others may be, while yet another one changes. What
//! changes while it is read is read again, so that a set is never half of before and half of after.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dcenet_policy::bundle::{Accepted, AcceptedError, BundleError, Trust, Verified};
use dcenet_policy::model::Catalog;
use dcenet_policy::sources::kubernetes::{DocumentError, Documents, Note, NoteKind};
use rustix::fs::OFlags;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

/// Why a directory's policies cannot be used.
#[derive(Debug)]
pub enum PoliciesError {
    /// It, or a file in it, cannot be read.
    Io {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A document is wrong.
    Document(DocumentError),
    /// It is no regular file, such as a pipe that nobody writes into.
    NotAFile(PathBuf),
    /// There is nothing in it: as a rule it is being written.
    Empty(PathBuf),
    /// It is longer than is read.
    TooLong(PathBuf),
    /// The directory changes all the time.
    Restless(PathBuf),
    /// None of its policies is in force, and others are.
    NoneLeft(PathBuf),
    /// A bundle is none, or of nobody who is trusted.
    Bundle {
        /// The file.
        path: PathBuf,
        /// Why.
        source: BundleError,
    },
    /// A bundle may not take the place of what was taken.
    Set(AcceptedError),
    /// A bundle, where nobody is trusted.
    NoTrust(PathBuf),
    /// A file beside bundles that nobody has signed.
    Unsigned(PathBuf),
    /// A file of the cluster's directory says what policies say.
    NotOfCluster(PathBuf),
}

impl PoliciesError {
    /// Whether it may be over without a change of the directory.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Restless(_) | Self::Set(AcceptedError::File { .. }))
    }
}

impl fmt::Display for PoliciesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Document(error) => error.fmt(f),
            Self::NotAFile(path) => write!(f, "{}: not a regular file; remove it", path.display()),
            Self::Empty(path) => write!(f, "{}: empty; write policies into it, or remove it", path.display()),
            Self::TooLong(path) => {
                write!(f, "{}: longer than the {MOST_BYTES} bytes that are read; make several of it", path.display())
            }
            Self::Restless(directory) => {
                write!(f, "{}: changes whenever it is read; change many files by one rename", directory.display())
            }
            Self::NoneLeft(directory) => write!(
                f,
                "{}: no policy is left in it, or none but in audit, as where nothing is mounted; put policies into it, or set \
                 policies.allowEmpty to true where none are wanted in force",
                directory.display()
            ),
            Self::Bundle { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Set(error) => error.fmt(f),
            Self::NoTrust(path) => write!(
                f,
                "{}: a bundle, and nobody is trusted; name the public keys of those who issue it in policies.trust.keys",
                path.display()
            ),
            Self::Unsigned(path) => write!(
                f,
                "{}: nobody has signed it, and where policies.trust is set this directory is for bundles alone; issue it in one, or put \
                 what tells of the cluster into policies.cluster",
                path.display()
            ),
            Self::NotOfCluster(path) => write!(
                f,
                "{}: policies.cluster is for namespaces, pods, nodes and services; put policies, tiers, groups, clusters, schedules and \
                 bundles into policies.directory",
                path.display()
            ),
        }
    }
}

impl std::error::Error for PoliciesError {}

/// What is read.
#[derive(Debug, Clone)]
pub struct Directories {
    /// The directory of policies.
    pub directory: PathBuf,
    /// The cluster's.
    pub cluster: Option<PathBuf>,
}

impl Directories {
    fn all(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.directory), self.cluster.as_ref()].into_iter().flatten().map(PathBuf::as_path)
    }
}

/// What directories and their files look like without being read: equal where nothing has changed, however that came about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    directories: Vec<(u64, u64)>,
    /// Of each file, or of what a symbolic link leads to; `None` where it leads nowhere.
    files: Vec<(PathBuf, Option<File>)>,
}

/// Device, inode, size and both times, in seconds and nanoseconds.
type File = (u64, u64, u64, (i64, i64), (i64, i64));

impl Signature {
    /// Looks.
    ///
    /// # Errors
    /// Where a directory cannot be listed.
    pub fn of(sources: &Directories) -> Result<Self, PoliciesError> {
        let (mut directories, mut files) = (Vec::new(), Vec::new());
        for directory in sources.all() {
            let found = directory.metadata().map_err(failed(directory))?;
            for path in paths(directory)? {
                let file = path
                    .metadata()
                    .ok()
                    .map(|m| (m.dev(), m.ino(), m.size(), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec())));
                files.push((path, file));
            }
            directories.push((found.dev(), found.ino()));
        }
        Ok(Self { directories, files })
    }
}

/// What of documents may surprise. Addresses of names are learnt where there is a proxy.
pub fn notes(documents: &Documents, learns: bool) -> impl Iterator<Item = Note> {
    documents.notes().into_iter().filter(move |note| !learns || note.kind != NoteKind::UnlearntNames)
}

/// What the directories say.
#[derive(Debug, Default)]
pub struct Set {
    /// All of it, that of bundles, too.
    pub documents: Documents,
    /// The bundles.
    pub bundles: Vec<Verified>,
    /// The same as they were read.
    pub envelopes: Vec<String>,
}

/// Reads all files of the directories, in the order of their names, and once more where something changes meanwhile. Returns
/// also what the directories looked like; nothing where that could not be seen.
///
/// # Errors
/// The first, which names file, document and field.
pub fn read(directories: &Directories, trust: Option<&Trust>) -> (Result<Set, PoliciesError>, Option<Signature>) {
    let mut before = match Signature::of(directories) {
        Ok(signature) => signature,
        Err(error) => return (Err(error), None),
    };
    for _ in 0..ATTEMPTS {
        let outcome = read_once(directories, trust);
        let after = match Signature::of(directories) {
            Ok(signature) => signature,
            Err(error) => return (Err(error), None),
        };
        if after == before {
            return (outcome, Some(after));
        }
        std::thread::sleep(PAUSE);
        before = after;
    }
    (Err(PoliciesError::Restless(directories.directory.clone())), Some(before))
}

/// How often a directory is read that changes meanwhile, and how long it is left alone in between.
const ATTEMPTS: usize = 10;
const PAUSE: Duration = Duration::from_millis(10);
/// More than all objects of a large cluster take.
const MOST_BYTES: u64 = 256 << 20;

fn failed(path: &Path) -> impl FnOnce(io::Error) -> PoliciesError {
    let path = path.to_owned();
    move |source| PoliciesError::Io { path, source }
}

fn paths(directory: &Path) -> Result<Vec<PathBuf>, PoliciesError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed(directory))? {
        let path = entry.map_err(failed(directory))?.path();
        if is_read(&path) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

fn read_once(directories: &Directories, trust: Option<&Trust>) -> Result<Set, PoliciesError> {
    let Set { mut documents, mut bundles, mut envelopes } = Set::default();
    for path in paths(&directories.directory)? {
        if !has_extension(&path, BUNDLE) {
            if trust.is_some() {
                return Err(PoliciesError::Unsigned(path));
            }
            documents = add(documents, &path)?;
            continue;
        }
        let trust = trust.ok_or_else(|| PoliciesError::NoTrust(path.clone()))?;
        let envelope = text_of(&path)?;
        let opened = trust.open(envelope.as_bytes());
        let verified = opened.map_err(|source| PoliciesError::Bundle { path: path.clone(), source })?;
        documents = verified.bundle.add_to(documents).map_err(PoliciesError::Document)?;
        bundles.push(verified);
        envelopes.push(envelope);
    }
    let before = said(&documents);
    for path in directories.cluster.iter().map(|cluster| paths(cluster)).collect::<Result<Vec<_>, _>>()?.concat() {
        if has_extension(&path, BUNDLE) {
            return Err(PoliciesError::NotOfCluster(path));
        }
        documents = add(documents, &path)?;
        if said(&documents) != before {
            return Err(PoliciesError::NotOfCluster(path));
        }
    }
    Ok(Set { documents, bundles, envelopes })
}

fn add(documents: Documents, path: &Path) -> Result<Documents, PoliciesError> {
    let (name, text) = (path.display().to_string(), text_of(path)?);
    let is_json = has_extension(path, "json");
    let added = if is_json { documents.with_json(&name, &text) } else { documents.with_yaml(&name, &text) };
    added.map_err(PoliciesError::Document)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// What was taken before.
///
/// # Errors
/// Where that is not known.
pub fn accepted(state_dir: &Path) -> Result<Accepted, String> {
    Accepted::read(&state_dir.join("policy-sets")).map_err(|error| {
        format!(
            "{error}; it says which bundles were taken, without which older ones would be: bring it back, or remove it"
        )
    })
}

/// The extension of bundles.
pub const BUNDLE: &str = "bundle";

/// How much is there of what policies say: the rest is of the cluster itself.
fn said(documents: &Documents) -> usize {
    let Catalog { tiers, groups, clusters, schedules, .. } = &documents.catalog;
    documents.policies.len() + tiers.len() + groups.len() + clusters.len() + schedules.len()
}

fn text_of(path: &Path) -> Result<String, PoliciesError> {
    // Not blocking, lest a FIFO without a writer stops us for ever.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed(path))?;
    let found = file.metadata().map_err(failed(path))?;
    if !found.is_file() {
        return Err(PoliciesError::NotAFile(path.to_owned()));
    }
    if found.len() == 0 {
        return Err(PoliciesError::Empty(path.to_owned()));
    }
    if found.len() > MOST_BYTES {
        return Err(PoliciesError::TooLong(path.to_owned()));
    }
    let mut text = String::new();
    file.take(MOST_BYTES + 1).read_to_string(&mut text).map_err(failed(path))?;
    if text.len() as u64 > MOST_BYTES { Err(PoliciesError::TooLong(path.to_owned())) } else { Ok(text) }
}

/// Editors and Kubernetes' volumes begin names with a dot that are not meant to be read.
fn is_read(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json" || e == BUNDLE)
}

/// Notices changes of directories by inotify(7).
#[derive(Debug)]
pub struct Watcher {
    events: OwnedFd,
    /// With what the kernel calls the watch on each directory itself; none after it was removed or moved, or unmounted.
    directories: Vec<(PathBuf, Option<i32>)>,
}

impl Watcher {
    /// Watches the directories.
    ///
    /// # Errors
    /// Where one is not there, or the user has no watch left (`fs.inotify.max_user_watches`).
    pub fn new(sources: &Directories) -> Result<Self, PoliciesError> {
        let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        let failed = |path: &Path, e: Errno| PoliciesError::Io { path: path.to_owned(), source: e.into() };
        let events = events.map_err(|e| failed(&sources.directory, e))?;
        let directories = sources.all().map(|directory| (directory.to_owned(), None)).collect();
        let mut this = Self { events, directories };
        for (directory, watch) in &mut this.directories {
            renew(&this.events, directory, watch).map_err(|e| failed(directory, e))?;
        }
        Ok(this)
    }

    /// Watches what the paths lead to now, which may be other directories than before.
    ///
    /// # Errors
    /// As [`Watcher::new`].
    pub fn renew(&mut self) -> Result<(), Errno> {
        self.directories.iter_mut().try_for_each(|(directory, watch)| renew(&self.events, directory, watch))
    }

    /// Takes what happened, and tells whether the directories are to be read again.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn changed(&mut self) -> io::Result<bool> {
        let mut changed = false;
        let mut lost = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.events, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let flags = event.events();
            if flags.intersects(ReadFlags::IGNORED | ReadFlags::MOVE_SELF | ReadFlags::DELETE_SELF) {
                lost.push(event.wd());
            }
            let of = self.directories.iter().find(|(_, watch)| *watch == Some(event.wd()));
            // Who creates a file closes it after writing; a symbolic link is whole at once.
            changed |= flags.intersects(!ReadFlags::CREATE)
                || of.zip(event.file_name()).is_some_and(|((directory, _), name)| {
                    directory.join(std::ffi::OsStr::from_bytes(name.to_bytes())).is_symlink()
                });
        }
        for (directory, watch) in &mut self.directories {
            if watch.is_some_and(|watch| lost.contains(&watch)) {
                *watch = None;
                changed = true;
            }
            changed |= watch.is_none() && renew(&self.events, directory, watch).is_ok();
        }
        Ok(changed)
    }
}

fn renew(events: &OwnedFd, directory: &Path, watch: &mut Option<i32>) -> Result<(), Errno> {
    let flags = WatchFlags::CLOSE_WRITE
        | WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    let now = inotify::add_watch(events, directory, flags)?;
    match watch.replace(now) {
        // It may have ended by itself.
        Some(before) if before != now => match inotify::remove_watch(events, before) {
            Err(Errno::INVAL) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        },
        _ => Ok(()),
    }
}

impl AsFd for Watcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use super::*;

    fn of(directory: &Path) -> Directories {
        Directories { directory: directory.to_owned(), cluster: None }
    }

    fn policy(name: &str) -> String {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{ name: {name}, namespace: shop }}\n\
             spec: {{ podSelector: {{}} }}\n"
        )
    }

    #[test]
    fn what_is_no_file_of_policies_is_refused_and_nobody_waits_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db.yaml");
        let refused = || read(&of(directory.path()), None).0.unwrap_err().to_string();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        assert!(refused().contains("db.yaml: not a regular file"), "{}", refused());
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(refused().contains("db.yaml: empty"), "{}", refused());
        fs::File::create(&path).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(refused().contains("db.yaml: longer than"), "{}", refused());
        fs::write(&path, policy("db")).unwrap();
        assert_eq!(read(&of(directory.path()), None).0.unwrap().documents.policies.len(), 1);
    }

    #[test]
    fn what_tells_of_the_cluster_says_nothing_that_policies_say() {
        let top = tempfile::tempdir().unwrap();
        let [directory, cluster] = ["policies", "cluster"].map(|name| top.path().join(name));
        for directory in [&directory, &cluster] {
            fs::create_dir(directory).unwrap();
        }
        let directories = Directories { directory: directory.clone(), cluster: Some(cluster.clone()) };
        let mut watcher = Watcher::new(&directories).unwrap();
        let (before, namespace) =
            (Signature::of(&directories).unwrap(), "apiVersion: v1\nkind: Namespace\nmetadata: { name: shop }\n");
        fs::write(directory.join("db.yaml"), policy("db")).unwrap();
        fs::write(cluster.join("shop.yaml"), namespace).unwrap();
        assert!(watcher.changed().unwrap() && !watcher.changed().unwrap());
        assert_ne!(Signature::of(&directories).unwrap(), before);
        let set = read(&directories, None).0.unwrap();
        assert_eq!((set.documents.policies.len(), set.documents.namespaces.len()), (1, 1));
        for (name, text) in [("more.yaml", policy("more")), ("more.bundle", "{}".to_owned())] {
            fs::write(cluster.join(name), text).unwrap();
            assert!(watcher.changed().unwrap(), "{name}");
            let told = read(&directories, None).0.unwrap_err().to_string();
            assert!(told.contains(name) && told.contains("policies.cluster is for namespaces"), "{told}");
            fs::remove_file(cluster.join(name)).unwrap();
        }
        fs::remove_dir_all(&cluster).unwrap();
        assert!(watcher.changed().unwrap());
        assert!(matches!(read(&directories, None).0, Err(PoliciesError::Io { path, .. }) if path == cluster));
        fs::create_dir(&cluster).unwrap();
        assert!(watcher.changed().unwrap(), "it is watched again");
        fs::write(cluster.join("shop.yaml"), namespace).unwrap();
        assert!(watcher.changed().unwrap());
    }

    #[test]
    fn a_signature_tells_of_changes_that_no_event_of_the_directory_tells_of() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        for name in ["one", "two", "elsewhere"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("elsewhere/db.yaml"), policy("db")).unwrap();
        symlink(at("elsewhere/db.yaml"), at("one/db.yaml")).unwrap();
        symlink(at("elsewhere/db.yaml"), at("two/db.yaml")).unwrap();
        symlink(at("one"), at("current")).unwrap();
        let now = || Signature::of(&of(&at("current"))).unwrap();
        let mut last = now();
        assert_eq!(last, now());
        let mut differs = |what: &str| {
            assert_ne!(last, now(), "{what}");
            last = now();
        };
        fs::write(at("elsewhere/db.yaml"), policy("db") + "# more\n").unwrap();
        differs("the target of a link is written");
        fs::write(at("fresh"), policy("bd")).unwrap();
        fs::rename(at("fresh"), at("elsewhere/db.yaml")).unwrap();
        differs("the target of a link is replaced");
        symlink(at("two"), at("next")).unwrap();
        fs::rename(at("next"), at("current")).unwrap();
        differs("the path leads to another directory");
        fs::write(at("two/.hidden.yaml"), "").unwrap();
        assert_eq!(last, now(), "what is not read does not count");
    }

    /// As Kubernetes swaps the files of a volume: all are links through one, which is replaced.
    #[test]
    fn a_set_is_never_half_of_before_and_half_of_after() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        let files: Vec<String> = (0..20).map(|n| format!("{n:02}.yaml")).collect();
        let fill = |round: usize| {
            fs::create_dir(at(&format!("..{round}"))).unwrap();
            for file in &files {
                fs::write(at(&format!("..{round}/{file}")), policy(&format!("p{}-{round}", &file[..2]))).unwrap();
            }
        };
        let swap = |round: usize| {
            symlink(format!("..{round}"), at("..fresh")).unwrap();
            fs::rename(at("..fresh"), at("..data")).unwrap();
        };
        fill(0);
        swap(0);
        for file in &files {
            symlink(format!("..data/{file}"), at(file)).unwrap();
        }
        let is_mixed = |set: &Set| {
            let rounds = set.documents.policies.keys().filter_map(|id| id.name.rsplit('-').next());
            rounds.collect::<std::collections::BTreeSet<_>>().len() != 1
        };
        let (done, limit) = (AtomicBool::new(false), Instant::now() + Duration::from_secs(60));
        let (mut mixed, mut whole, mut mixed_once) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in (1..).take_while(|_| !done.load(Ordering::Acquire)) {
                    fill(round);
                    swap(round);
                    if let Some(old) = round.checked_sub(3) {
                        fs::remove_dir_all(at(&format!("..{old}"))).unwrap();
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            while (mixed_once == 0 || whole < 20) && Instant::now() < limit {
                if let Ok(set) = read(&of(top.path()), None).0 {
                    whole += 1;
                    mixed += usize::from(is_mixed(&set));
                }
                mixed_once += usize::from(read_once(&of(top.path()), None).is_ok_and(|set| is_mixed(&set)));
            }
            done.store(true, Ordering::Release);
        });
        assert!(whole > 0 && mixed == 0, "{mixed} of {whole}");
        assert!(mixed_once > 0, "the same reading without the second look is not seen to mix");
        assert!(!is_mixed(&read(&of(top.path()), None).0.unwrap()));
    }
}
