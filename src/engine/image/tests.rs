use std::cell::RefCell;
use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::intake::ImageIntake;
use super::outgoing::{OutgoingPart, send};
use super::*;
use crate::engine::archive;
use crate::fuzz::Target;

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An image of these layers: what is known of it, its configuration, and as an engine saves it.
fn image(layers: &[&[u8]]) -> (EngineImage, Vec<u8>, Vec<u8>) {
    let digests: Vec<String> = layers.iter().map(|l| format!("sha256:{}", digest(l))).collect();
    let config = serde_json::json!({ "rootfs": { "type": "layers", "diff_ids": digests } });
    let config = serde_json::to_vec(&config).unwrap();
    let id = digest(&config);
    let mut files: Vec<(String, &[u8])> = vec![("blobs/".into(), b"")];
    files.extend(layers.iter().map(|l| (format!("{}.tar", digest(l)), *l)));
    files.push((format!("blobs/sha256/{id}"), &config));
    files.push(("manifest.json".into(), b"[]"));
    let files: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (n.as_str(), *b)).collect();

    let mut saved = Vec::new();
    archive::write(&mut saved, &files).unwrap();
    let image = EngineImage {
        id: format!("sha256:{id}"),
        name: "app:1".into(),
        layers: digests,
        bytes: 1000,
        never: false,
    };
    (image, config, saved)
}

/// Sends a saved image, and takes it in; the archive that the engine is given.
fn carry(image: &EngineImage, saved: &[u8], there: usize, at: &Path) -> Result<u64> {
    let mut intake = ImageIntake::new(image, there, at)?;
    let mut came = 0;
    let sent = send(saved, image, there, &mut |part| match part {
        OutgoingPart::Begins(digest, bytes) => {
            came = 0;
            intake.begins(digest, bytes)
        }
        OutgoingPart::Bytes(bytes) => {
            intake.feed(came, bytes)?;
            came += bytes.len() as u64;
            Ok(())
        }
    })?;
    intake.finish()?;
    Ok(sent)
}

fn files(at: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(fs::File::open(at).unwrap());
    let read = |entry: std::io::Result<tar::Entry<fs::File>>| {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (entry.path().unwrap().display().to_string(), bytes)
    };
    archive.entries().unwrap().map(read).collect()
}

#[test]
fn what_is_lacking_goes_and_the_engine_gets_an_archive() {
    let (one, two) = (vec![1; 700], vec![2; 100_000]);
    let (image, config, saved) = image(&[&one, &two, &one]);
    for there in 0..=3 {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("archive");
        let sent = carry(&image, &saved, there, &at).unwrap();
        let files = files(&at);
        let has = |layer: &[u8]| files[&format!("{}.tar", digest(layer))].len();
        // The first is the last as well.
        assert_eq!(
            (has(&one), has(&two)),
            [(700, 100_000), (700, 100_000), (700, 0), (0, 0)][there]
        );
        assert_eq!(sent as usize, has(&one) + has(&two) + config.len());
        assert_eq!(files[&format!("{}.json", bare(&image.id))], config);
        let said: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        assert_eq!(said[0]["Layers"].as_array().unwrap().len(), 3);
        assert!(said[0]["RepoTags"].is_null());
    }
    let dir = tempfile::tempdir().unwrap();
    let short = carry(&image, &saved[..saved.len() / 2], 0, &dir.path().join("a"));
    assert!(short.is_err());
    let (other, ..) = self::image(&[&one, b"another"]);
    let why = carry(&other, &saved, 0, &dir.path().join("b")).unwrap_err();
    assert!(why.to_string().contains("without"), "{why}");
}

#[test]
fn nothing_is_taken_but_what_the_id_vouches_for() {
    let layer = vec![1; 700];
    let (image, config, _) = image(&[&layer]);
    let (id, of_layer) = (bare(&image.id), digest(&layer));
    let dir = tempfile::tempdir().unwrap();
    let number = RefCell::new(0);
    let intake = || {
        *number.borrow_mut() += 1;
        ImageIntake::new(&image, 0, &dir.path().join(number.borrow().to_string())).unwrap()
    };

    let mut good = intake();
    good.begins(id, config.len() as u64).unwrap();
    good.feed(0, &config).unwrap();
    assert!(good.begins(id, 3).is_err(), "a configuration, twice");
    good.begins(&of_layer, 700).unwrap();
    good.feed(0, &layer[..1]).unwrap();
    assert!(good.begins(&of_layer, 700).is_err(), "a part in a part");
    assert!(good.feed(2, &layer[2..]).is_err(), "a gap");
    assert!(good.feed(1, &layer).is_err(), "more than was announced");
    good.feed(1, &layer[1..]).unwrap();
    assert!(good.feed(700, &[]).is_err(), "bytes of nothing");
    assert!(good.begins(&of_layer, 700).is_err(), "a layer, twice");
    good.finish().unwrap();

    for (what, part, bytes) in [
        ("a layer of another image", digest(b"x"), &b"x"[..]),
        ("a path", "../../etc/passwd".into(), b"x"),
        ("another layer", of_layer.clone(), &[2; 700]),
        ("another configuration", id.to_owned(), b"{}"),
    ] {
        let mut intake = intake();
        let told = intake.begins(&part, bytes.len() as u64).and_then(|()| intake.feed(0, bytes));
        assert!(told.is_err(), "{what}");
    }
    assert!(intake().begins(id, u64::MAX).is_err(), "a configuration without end");
    let why = intake().begins(&of_layer, u64::MAX).unwrap_err();
    assert!(why.to_string().contains("no room"), "{why}");
    assert!(intake().finish().is_err(), "nothing");

    // One with the right ID, that has other layers than the plan says.
    let lying = EngineImage { layers: vec![format!("sha256:{}", digest(b"x"))], ..image.clone() };
    let mut intake = ImageIntake::new(&lying, 0, &dir.path().join("lying")).unwrap();
    intake.begins(id, config.len() as u64).unwrap();
    intake.feed(0, &config).unwrap();
    intake.begins(&digest(b"x"), 1).unwrap();
    intake.feed(0, b"x").unwrap();
    let why = intake.finish().unwrap_err();
    assert!(why.to_string().contains("announced"), "{why}");
}

/// Records: a byte that says what it is, a length, and that.
#[test]
fn fuzz_engine_image() {
    let layer = vec![1; 40];
    let (image, config, _) = image(&[&layer]);
    let record = |kind: u8, body: &[u8]| [&[kind, body.len() as u8][..], body].concat();
    let (id, of_layer) = (bare(&image.id).to_owned(), digest(&layer));
    let sample: Vec<u8> = [
        record(0, format!("{:04}{id}", config.len()).as_bytes()),
        record(1, &config),
        record(0, format!("0040{of_layer}").as_bytes()),
        record(1, &layer),
    ]
    .concat();
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("archive");

    Target::new("engine-image").room(1 << 20).sample(sample).run(|mut bytes| {
        let _ = fs::remove_file(&at);
        let mut intake = ImageIntake::new(&image, 0, &at)?;
        let mut came = 0;
        while let [kind, length, rest @ ..] = bytes {
            let (body, rest) = rest.split_at((*length as usize).min(rest.len()));
            bytes = rest;
            if *kind == 0 {
                came = 0;
                let text = String::from_utf8_lossy(body).into_owned();
                let (length, digest) = text.split_at_checked(4).unwrap_or(("0", ""));
                intake.begins(digest, length.parse().unwrap_or(u64::MAX))?;
            } else {
                intake.feed(came, body)?;
                came += body.len() as u64;
            }
        }
        intake.finish()
    });
}

#[test]
fn no_name_is_taken_away() {
    let hex = |digit: char| digit.to_string().repeat(64);
    let found = |digit: char, names: &[&str], layers: &[&str]| FoundImage {
        id: hex(digit),
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        layers: layers.iter().map(|layer| (*layer).to_owned()).collect(),
        bytes: 1,
    };
    let wanted = |name: &str| EngineImage {
        id: format!("sha256:{}", hex('a')),
        name: name.into(),
        layers: vec!["1".into(), "2".into(), "3".into()],
        ..EngineImage::default()
    };
    let decide =
        |wanted: &EngineImage,
         by_name: Option<&FoundImage>,
         by_id: Option<&FoundImage>,
         all: &[FoundImage]| { decide(Engine::Docker, wanted, (by_name, by_id), all, "b") };

    let tagged = wanted("app:1");
    let own = found('a', &["app:2"], &[]);
    let bare = found('a', &[], &[]);
    let other = found('b', &["app:1"], &["1", "2"]);
    assert_eq!(decide(&tagged, Some(&own), None, &[]).unwrap(), ImageCourse::There);
    let why = decide(&tagged, Some(&other), None, &[]).unwrap_err();
    assert!(why.fatal && why.why.contains(&hex('a')[..12]) && why.why.contains(&hex('b')[..12]));
    assert_eq!(decide(&tagged, None, Some(&own), &[]).unwrap(), ImageCourse::Named);
    let why = decide(&tagged, None, Some(&bare), &[]).unwrap_err();
    assert!(why.hint.contains("docker tag"), "{why}");

    let others = [found('c', &[], &["1", "x", "3"]), other.clone(), found('d', &[], &["2"])];
    assert_eq!(decide(&tagged, None, None, &others).unwrap(), ImageCourse::Copied { there: 2 });
    assert_eq!(decide(&tagged, None, None, &[]).unwrap(), ImageCourse::Copied { there: 0 });
    let never = EngineImage { never: true, ..tagged.clone() };
    let why = decide(&never, None, None, &others).unwrap_err();
    assert!(why.what.contains("has no image app:1"), "{why}");

    // What can be no tag needs none.
    for name in ["app@sha256:0123", &hex('a')[..12], &hex('a')] {
        let wanted = wanted(name);
        assert_eq!(decide(&wanted, None, Some(&bare), &[]).unwrap(), ImageCourse::There, "{name}");
        assert_eq!(made(&wanted, ImageCourse::Copied { there: 0 }).unwrap().name, "");
    }
    let copied = ImageCourse::Copied { there: 0 };
    assert_eq!(made(&tagged, copied).unwrap(), MadeImage { id: hex('a'), name: "app:1".into() });
    assert_eq!(made(&tagged, ImageCourse::There), None);
}

/// An engine with one image, which notes what is asked of it.
#[derive(Default)]
struct OneImage {
    found: std::sync::Mutex<Option<FoundImage>>,
    asked: std::sync::Mutex<Vec<String>>,
}

impl OneImage {
    fn note(&self, what: String) -> Result<()> {
        self.asked.lock().unwrap().push(what);
        Ok(())
    }
}

impl ImageStore for OneImage {
    fn find(&self, word: &str) -> Result<Option<FoundImage>> {
        let found = self.found.lock().unwrap().clone();
        Ok(found.filter(|f| f.id == word || f.names.iter().any(|name| name == word)))
    }
    fn all(&self) -> Result<Vec<FoundImage>> {
        Ok(Vec::new())
    }
    fn scratch(&self, _: &EngineWants) -> PathBuf {
        "/".into()
    }
    fn save(&self, _: &str) -> Result<Box<dyn Read + Send>> {
        bail!("nothing is saved")
    }
    fn load(&self, _: &Path) -> Result<()> {
        let id = "a".repeat(64);
        *self.found.lock().unwrap() = Some(FoundImage { id, ..FoundImage::default() });
        self.note("load".into())
    }
    fn end_load(&self, _: &Path) {}
    fn name(&self, _: &str, name: &str) -> Result<()> {
        if let Some(found) = &mut *self.found.lock().unwrap() {
            found.names.push(name.into());
        }
        self.note(format!("name {name}"))
    }
    fn remove(&self, word: &str) -> Result<()> {
        let mut found = self.found.lock().unwrap();
        if let Some(one) = &mut *found {
            one.names.retain(|name| name != word);
            if one.names.is_empty() {
                *found = None;
            }
        }
        self.note(format!("remove {word}"))
    }
}

/// Only what was made goes, and only if nobody else has come to use it.
#[test]
fn what_was_made_is_taken_away_and_nothing_else() {
    let id = "a".repeat(64);
    let run = |before: Option<&[&str]>, course: &str, meanwhile: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let made: Made = serde_json::from_value(serde_json::json!({
            "engine": "docker", "container": "c", "volumes": [],
            "image": { "id": id, "name": "app:1" }, "noted": dir.path().join("noted"),
            "upper": dir.path().join("upper"), "log": dir.path().join("log"),
        }))
        .unwrap();
        let store = OneImage::default();
        *store.found.lock().unwrap() = before.map(|names| FoundImage {
            id: id.clone(),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..FoundImage::default()
        });

        match course {
            "take" => take(&store, &made).unwrap(),
            "name" => name(&store, &made).unwrap(),
            _ => {}
        }
        if let Some(found) = &mut *store.found.lock().unwrap() {
            found.names.extend(meanwhile.iter().map(|name| (*name).to_owned()));
        }
        discard(&store, &made).unwrap();
        let left = store.found.lock().unwrap().clone().map(|found| found.names);
        (left, store.asked.lock().unwrap().join(", "))
    };

    assert_eq!(run(None, "take", &[]), (None, "load, name app:1, remove app:1".into()));
    let somebodys = Some(vec!["other".to_owned()]);
    let asked = "load, name app:1, remove app:1".to_owned();
    assert_eq!(run(None, "take", &["other"]), (somebodys.clone(), asked));
    // Somebody has brought it meanwhile, with its name or without.
    assert_eq!(run(Some(&["app:1"]), "take", &[]), (Some(vec!["app:1".into()]), String::new()));
    let named = "name app:1, remove app:1".to_owned();
    assert_eq!(run(Some(&["other"]), "take", &[]), (somebodys.clone(), named.clone()));
    assert_eq!(run(Some(&["other"]), "name", &[]), (somebodys, named));
    assert_eq!(run(Some(&["app:1"]), "", &[]), (Some(vec!["app:1".into()]), String::new()));
}
