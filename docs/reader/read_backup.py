#!/usr/bin/env python3
"""Reads a walfleet repository in a folder: written from docs/format.md alone, to prove that it can be done.

Needs the packages cryptography, blake3 and zstandard. Numbers in comments are sections of docs/format.md.
"""
import itertools, os, struct, sys, zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

def check(condition, what):
    if not condition:
        raise ValueError(what)

def varint(data, at):
    value = shift = 0
    while data[at] > 127:
        value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1

def message(data):
    """A protobuf message as {field number: [values]}; of lengths and numbers alone, which is all the format uses."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = varint(data, at)
        value, at = varint(data, at)
        if tag & 7:
            check(tag & 7 == 2 and at + value <= len(data), "a message that does not read")
            value, at = data[at:at + value], at + value
        fields.setdefault(tag >> 3, []).append(value)
    return fields

def number(fields, key):
    value = fields.get(key, [0])[-1]
    return value - (1 << 64) if value >> 63 else value

raw = lambda fields, key: fields.get(key, [b""])[-1]
text = lambda fields, key: raw(fields, key).decode()
derive = lambda context, *parts: blake3(b"".join(parts), derive_key_context=context).digest()

def packed(data, at=0):
    while at < len(data):
        value, at = varint(data, at)
        yield value

def ascending(data):
    """Numbers of which each stands as how many lie between it and the one before."""
    return [total + i for i, total in enumerate(itertools.accumulate(packed(data)))]

class Repository:
    def __init__(self, folder, key_file):
        self.folder = folder
        self.get = lambda key: open(os.path.join(folder, key), "rb").read()
        self.has = lambda key: os.path.exists(os.path.join(folder, key))
        lines = [line for line in open(key_file).read().split("\n") if line.strip() and line[0] != "#"]  # 2
        check(lines[0] == "walfleet-key: 1", "not a key file")
        values = dict(line.replace(" ", "").split(":", 1) for line in lines)
        self.secret = X25519PrivateKey.from_private_bytes(bytes.fromhex(values["recipient-secret"]))
        self.recipient = self.secret.public_key().public_bytes_raw()
        root = message(self.clear("walfleet-repository", 1))  # 4
        check(number(root, 2) == 1, "the repository needs a newer reader")
        self.id, self.root_key = raw(root, 1), raw(root, 3)
        own = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(values["signing-seed"])).public_key()
        check(values["kind"] != "recovery" or own.public_bytes_raw() == self.root_key, "another root key")

    def clear(self, key, kind):  # 3
        data = self.get(key)
        check(data[:12] == struct.pack("<8sHH", b"WALFLEET", 1, kind), key + ": not the object it should be")
        check(struct.pack("<I", len(data) - 48) == data[12:16], key + ": of another length")
        check(blake3(data[:-32]).digest() == data[-32:], key + ": damaged")
        return data[16:-32]

    def verify(self, key, body):  # 5
        signed, public_key = message(body), Ed25519PublicKey.from_public_bytes
        payload, signer, chain = raw(signed, 1), raw(signed, 2), signed.get(4, [])
        content = b"walfleet signed object v1\0" + self.id + key.encode() + b"\0" + payload
        public_key(signer).verify(raw(signed, 3), content)
        check(len(chain) <= 2, "a chain too long")
        holder, writer = self.root_key, {"role": 0, "name": "", "clusters": [], "from": -1 << 63, "to": 1 << 63}
        for certificate in map(message, reversed(chain)):
            content, claims = b"walfleet writer certificate v1\0" + raw(certificate, 1), message(raw(certificate, 1))
            public_key(holder).verify(raw(certificate, 2), content)
            check(raw(claims, 1) in (b"", self.id), "a certificate of another repository")
            check((writer["role"], number(claims, 3)) in ((0, 1), (0, 2), (2, 1)), "its issuer may not certify")
            since, until = max(writer["from"], number(claims, 6)), min(writer["to"], number(claims, 7))
            holder, writer = raw(claims, 2), {"role": number(claims, 3), "name": text(claims, 4), "from": since,
                                              "to": until, "clusters": [c.decode() for c in claims.get(5, [])]}
        check(holder == signer, "not rooted")
        return payload, writer

class Cluster:
    """6. Folds what decides where to read, without the rules that are there to guard deletion."""
    def __init__(self, repository, name):
        self.repository, self.name, self.domain, self.epoch = repository, name, None, 0
        self.commitments, self.sessions, self.moved = {}, {}, {}
        path, sequence = lambda number: "clusters/%s/log/%020d" % (name, number), 0
        while repository.has(path(sequence)):
            body = repository.clear(path(sequence), 2)  # a damaged envelope ends it all
            try:
                self.fold(sequence, *repository.verify(path(sequence), body))
            except (InvalidSignature, IndexError, ValueError) as error:
                print("log entry %d is void: %s" % (sequence, error or "signature"), file=sys.stderr)
            sequence += 1
        check(not repository.has(path(sequence + 1)), "log entry %d is missing" % sequence)
        self.keys = {version: self.unwrap(version) for version in self.commitments}

    def fold(self, sequence, payload, writer):
        entry = message(payload)
        check(text(entry, 1) == self.name and number(entry, 2) == sequence, "another entry")
        check(writer["from"] <= number(entry, 4) <= writer["to"], "the certificate was not valid then")
        keeper, epoch, seen = writer["role"] == 2, number(entry, 5), self.epoch
        self.epoch = max(seen, epoch) if keeper else seen
        check(epoch >= seen if keeper else epoch == 0, "an old epoch")
        kind, = [field for field in entry if 10 <= field <= 23]
        action = message(raw(entry, kind))
        name = raw(action, 1)  # a session or backup, where the action has one
        session = self.sessions.get(name)
        if writer["role"] == 1:
            check(self.name in writer["clusters"] and kind in (10, 12, 13, 14), "may not write this")
            check(kind < 13 or not session or session["by"] == writer["name"], "another's session")
        check((kind == 10) == (self.domain is None), "begun or not begun")
        if kind == 10:
            self.domain, self.commitments = raw(action, 1), {1: raw(action, 2)}
        elif kind == 11:
            check(number(action, 1) == max(self.commitments) + 1, "not the next key version")
            self.commitments[number(action, 1)] = raw(action, 2)
        elif kind == 12:
            run = raw(action, 3)
            served = [s for s in self.sessions.values() if s["run"] == run and s["state"] != "aborted"]
            check(not session and not (run and served), "not new")
            self.sessions[name] = {"state": "open", "by": writer["name"], "run": run}
        elif kind in (13, 14, 17, 18, 19):
            before, after = {13: ("open", "live"), 14: ("open", "aborted"), 17: ("live", "expired"),
                             18: ("expired", "live"), 19: ("expired", "purged")}[kind]
            check(session and session["state"] == before, "not " + before)
            session["state"] = after
            if kind == 13:
                session["manifest"], session["reference"] = raw(action, 2), raw(action, 3)
        elif kind == 23:
            self.moved[name] = text(action, 2)

    def unwrap(self, version):  # 7
        own, identity = self.repository.recipient, self.domain + struct.pack("<I", version)
        wrapped = message(self.repository.clear("keys/%s/%d/%s" % (self.domain.hex(), version, own.hex()), 4))
        shared = self.repository.secret.exchange(X25519PublicKey.from_public_bytes(raw(wrapped, 4)))
        key = AESGCM(derive("walfleet 2026-11 domain key wrap v1", shared, raw(wrapped, 4), own))
        secret = message(key.decrypt(bytes(12), raw(wrapped, 5), identity))
        keys = raw(secret, 3), raw(secret, 4)
        commitment = derive("walfleet 2026-11 domain key commitment v1", identity, *keys)
        check(commitment == self.commitments[version], "not the key that the log commits to")
        return keys

    def backup(self, name):  # 10
        session, key = self.sessions.get(name.encode(), {}), "clusters/%s/backups/%s" % (self.name, name)
        check(session.get("state") in ("live", "expired"), "no such backup")
        for suffix, digest in (("", session["manifest"]), (".refs", session["reference"])):
            check(blake3(self.repository.get(key + suffix)).digest() == digest, key + suffix + ": another digest")
        reference, _ = self.repository.verify(key + ".refs", self.repository.clear(key + ".refs", 5))
        packs = {}
        for place in map(message, message(reference).get(20, [])):
            for pack in (raw(message(use), 1) for use in place.get(3, [])):
                home = (text(place, 2) or self.name, self.moved.get(pack, text(place, 1)), pack.hex())
                packs[pack] = "clusters/%s/packs/%s/%s" % home
        manifest = message(Sealed(self, key, 17).directory)
        check(set(packed(raw(manifest, 3))) <= {1}, "the manifest needs a newer reader")
        return manifest, Packs(self, packs)

class Sealed:  # 8
    def __init__(self, cluster, key, kind):
        self.data = cluster.repository.get(key)
        magic, domain, binary, salt, commitment = struct.unpack("<12s16s4s32s32s", self.data[:96])
        check(magic == struct.pack("<8sHH", b"WALFSEAL", 1, kind), key + ": not the object it should be")
        offset, length, _, magic = struct.unpack("<QII8s", self.data[-24:])
        check(magic == b"WALFTAIL", key + ": cut")
        seed = (cluster.keys[struct.unpack("<I", binary)[0]][1], domain, salt)
        check(derive("walfleet 2026-11 object key commitment v1", *seed) == commitment, key + ": another key")
        self.key = AESGCM(derive("walfleet 2026-11 object key v1", *seed))
        self.authenticated = struct.pack("<H", kind) + domain + binary + (salt if kind == 16 else key.encode())
        check(kind != 16 or key.endswith(blake3(self.data).hexdigest()), key + ": not what its name says")
        self.directory = self.frame(offset, len(self.data) - 24 - offset, length)

    def frame(self, offset, stored, length):
        nonce = bytes(4) + struct.pack("<Q", offset)
        plain = self.key.decrypt(nonce, self.data[offset:offset + stored], self.authenticated)
        if len(plain) != length:
            plain = zstandard.ZstdDecompressor().decompress(plain, max_output_size=length)
        check(len(plain) == length, "a frame of another length")
        return plain

class Packs:  # 9, 10
    def __init__(self, cluster, keys):
        self.cluster, self.keys, self.opened = cluster, keys, {}

    def chunk(self, pack, offset, stored, length, short):
        if pack not in self.opened:
            self.opened[pack] = Sealed(self.cluster, self.keys[pack], 16)
        plain = self.opened[pack].frame(offset, stored, length)
        check(blake3(plain, key=self.cluster.keys[1][0]).digest()[:16] == short, "a chunk that is not its id's")
        return plain

    def place(self, table, place):
        place = message(place)
        return self.chunk(table[number(place, 1)], *(number(place, n) for n in (2, 3, 4)), raw(place, 5))

    def slots(self, file_map, whole=False):
        check(not (whole and 6 in file_map), "a map over a map over a map")
        slots, table = message(raw(file_map, 4)), [None, *file_map.get(3, [])]
        arrays, ids = (packed(raw(slots, n)) for n in (1, 2, 3)), raw(slots, 4)
        return [(table[pack], *rest, ids[16 * i:16 * i + 16]) for i, (pack, *rest) in enumerate(zip(*arrays))]

    def content(self, table, entry):
        if 8 not in entry:
            return self.place(table, entry[7][0]) if 7 in entry else bytes(number(entry, 3))
        file_map = message(self.place(table, entry[8][0]))
        size, places, start, content = number(file_map, 2), self.slots(file_map), 0, []
        if 6 in file_map:  # over another map, of which only the slots that differ are named
            former = self.slots(message(self.place(file_map.get(3, []), file_map[6][0])), whole=True)
            own = dict(zip(ascending(raw(file_map, 7)), places, strict=True))
            places = [own.get(i) or former[i] for i in range(-(-size // number(file_map, 1)))]
        for pack, offset, stored, short in places:
            length = min(number(file_map, 1), size - start)
            content.append(self.chunk(pack, offset, stored, length, short) if pack else bytes(length))
            start += length
        table = file_map.get(3, [])
        check(start == size == number(entry, 3), "a file of another size")
        content, laid = bytearray(b"".join(content)), set()
        for overlay in map(message, file_map.get(5, [])):
            chunk, (pages, positions) = self.place(table, raw(overlay, 1)), (ascending(raw(overlay, n)) for n in (2, 3))
            for page, position in zip(pages, positions or range(len(pages)), strict=True):
                check(page * 8192 + 8192 <= size and position * 8192 + 8192 <= len(chunk), "a page that is not there")
                check(page not in laid and not laid.add(page), "a page laid over twice")
                content[page * 8192:page * 8192 + 8192] = chunk[position * 8192:position * 8192 + 8192]
        return bytes(content)

    def files(self, manifest):
        for place in manifest.get(31, []):
            part = message(self.place(manifest.get(30, []), place))
            yield from ((part.get(1, []), message(entry)) for entry in part.get(2, []))
        yield manifest.get(30, []), message(raw(manifest, 35))  # pg_control, last

def wal(cluster, key):  # 11
    if key.endswith(("/history", ".backup")):
        return raw(message(Sealed(cluster, key, 20).directory), 3)
    segment = Sealed(cluster, key, 18)
    directory = message(segment.directory)
    frames = ((number(frame, n) for n in (1, 2, 3)) for frame in map(message, directory.get(9, [])))
    content = b"".join(segment.frame(*frame) for frame in frames)
    check(blake3(content, key=cluster.keys[1][0]).digest() == raw(directory, 7), "another content id")
    return content.ljust(number(directory, 5), b"\0")

def pieces(cluster, folder):  # 11: an unfinished segment, from the folder of its pieces
    root, ways, longest = cluster.repository.folder, {}, b""
    names = sorted(os.listdir(os.path.join(root, folder)), key=lambda name: name.split("."))
    for name in names:
        piece = Sealed(cluster, folder.rstrip("/") + "/" + name, 19)
        directory = message(piece.directory)
        start, member = number(directory, 6), raw(directory, 14)
        before = ways.get((member, start, raw(directory, 8)), None if start else b"")
        if before is not None:
            frames = ((number(frame, n) for n in (1, 2, 3)) for frame in map(message, directory.get(10, [])))
            content = before + b"".join(piece.frame(*frame) for frame in frames)
            check(len(content) == number(directory, 7), name + ": another length")
            check(blake3(content, key=cluster.keys[1][0]).digest() == raw(directory, 9), name + ": another content id")
            ways[member, len(content), raw(directory, 9)] = content
            longest = max(longest, content[:number(directory, 13)], key=len)  # whole records only
    return longest.ljust(number(directory, 5), b"\0")

def main(folder, key_file, name, verb="backups", subject="", *rest):
    cluster = Cluster(Repository(folder, key_file), name)
    if verb == "backups":
        print("\n".join(backup.decode() + " " + session["state"] for backup, session in cluster.sessions.items()))
    elif verb == "wal":
        open(rest[0], "wb").write((pieces if subject.startswith("tails/") else wal)(cluster, subject))
    else:
        manifest, packs = cluster.backup(subject)
        for table, entry in packs.files(manifest):
            path, is_folder = text(entry, 1), number(entry, 2) == 2
            if verb == "list":
                print("%04o %10d %s" % (number(entry, 4), number(entry, 3), path + "/" * is_folder))
            elif verb == "all" and is_folder:
                os.makedirs(os.path.join(rest[0], path))
            elif verb == "all" or path == rest[0]:
                out = rest[1] if verb == "file" else os.path.join(rest[0], path)
                open(out, "wb").write(packs.content(table, entry))

main(*sys.argv[1:])
