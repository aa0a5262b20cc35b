//! Linux' accounts of processes and of the machine: memory, control groups, processor time; and whether the user pressed Ctrl-C. Each account reads files below a root folder,
//! so that tests bring their own; on other systems each gives `None`.

mod control_groups;
pub mod cpu_usage;
pub mod interrupt;
pub mod memory;

#[cfg(test)]
pub(crate) mod testing {
    /// A root folder with these files.
    pub fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }
}
