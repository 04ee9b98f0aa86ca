//! What a server may do between two backups, chosen by chance.

use rand::RngExt;
use rand::rngs::StdRng;
use walfleet_integration_tests::fleet::Standalone;
use walfleet_integration_tests::postgres::Shutdown;

/// Changes one server's data.
pub struct Writer {
    pub host: Standalone,
    pub rng: StdRng,
    tables: Vec<String>,
    indexes: Vec<String>,
    databases: Vec<String>,
    made: u32,
}

/// `stair` has a row on each page, so that its length is what a test says.
const SCHEMA: &str = "
    CREATE TABLE stair (id integer, body text); ALTER TABLE stair ALTER body SET STORAGE PLAIN;
    CREATE SEQUENCE counter; CREATE SEQUENCE cached CACHE 10;";

/// Around the edges of slots (16 pages).
const STAIRS: [u32; 10] = [0, 1, 8, 15, 16, 17, 31, 32, 48, 100];

impl Writer {
    pub fn new(host: Standalone, rng: StdRng) -> anyhow::Result<Writer> {
        // Nothing is written to data files but by checkpoints, and nothing is done but what the test does.
        let quiet = [
            ("autovacuum", "off"),
            ("checkpoint_timeout", "1h"),
            ("bgwriter_lru_maxpages", "0"),
            ("shared_buffers", "256MB"),
            ("max_wal_size", "4GB"),
        ];
        host.server.append_settings(quiet.into_iter())?;
        let mut writer = Writer { host, rng, tables: vec![], indexes: vec![], databases: vec![], made: 0 };
        writer.host.server.restart()?;
        writer.run(&[SCHEMA])?;
        for _ in 0..3 {
            writer.create_table()?;
        }
        Ok(writer)
    }

    fn run(&self, statements: &[&str]) -> anyhow::Result<()> {
        let session = self.host.server.session()?;
        statements.iter().try_for_each(|statement| session.execute(statement))
    }

    fn below(&mut self, count: u32) -> u32 {
        self.rng.random_range(0..count)
    }

    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}_{}", self.made)
    }

    fn table(&mut self) -> String {
        let index = self.below(self.tables.len() as u32) as usize;
        self.tables[index].clone()
    }

    fn tablespace(&mut self) -> &'static str {
        ["fast", "pg_default"][self.below(2) as usize]
    }

    /// Does one thing, and says what.
    pub fn change(&mut self) -> anyhow::Result<String> {
        match self.below(32) {
            0..3 => self.write(),
            3 => self.change_accounts(),
            4 => self.copy(),
            5..7 => self.vacuum(),
            7 => self.rewrite(),
            8 => self.truncate(),
            9 => self.create_table(),
            10 => self.drop_table(),
            11..13 => self.create_index(),
            13 => self.drop_index(),
            14 => self.move_table(),
            15..17 => self.turn_logging(),
            17..19 => self.create_database(),
            19 => self.drop_database(),
            20 => self.move_database(),
            21..23 => self.change_databases(),
            23 => self.count_on(),
            24 => self.crash().map(|()| "crash".to_owned()),
            25 => self.host.server.restart().map(|()| "restart".to_owned()),
            26 => self.roll_back(),
            27..31 => self.climb(),
            _ => self.small_things(),
        }
    }

    fn one(&self, statement: String) -> anyhow::Result<String> {
        self.run(&[&statement])?;
        Ok(statement)
    }

    fn write(&mut self) -> anyhow::Result<String> {
        let (table, part) = (self.table(), self.below(97));
        let kind = self.below(3);
        self.one(match kind {
            0 => rows(&table, 1 + 40 * part),
            1 => format!("UPDATE {table} SET k = k + 1, tags = ARRAY[k, {part}] WHERE id % 97 = {part}"),
            _ => format!("DELETE FROM {table} WHERE id % 29 = {}", part % 29),
        })
    }

    /// Single pages of a larger table.
    fn change_accounts(&mut self) -> anyhow::Result<String> {
        let (part, step) = (self.below(5000), [5000, 1000, 97][self.below(3) as usize]);
        self.one(format!("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % {step} = {part} % {step}"))
    }

    fn copy(&mut self) -> anyhow::Result<String> {
        let (name, rows) = (self.name("copied"), 1 + self.below(20_000));
        let program = format!("COPY {name} (id) FROM PROGRAM 'seq {rows}' WITH (FREEZE)");
        let statement = format!("CREATE TABLE {name} (id integer, k integer, body text, tags integer[]); {program}");
        self.tables.push(name);
        self.one(statement)
    }

    fn vacuum(&mut self) -> anyhow::Result<String> {
        let table = self.table();
        let options = ["", "(FREEZE)", "(ANALYZE)", "(INDEX_CLEANUP TRUE)"][self.below(4) as usize];
        self.one(format!("VACUUM {options} {table}"))
    }

    fn rewrite(&mut self) -> anyhow::Result<String> {
        let (table, kind) = (self.table(), self.below(4));
        let column = self.name("added");
        self.one(match kind {
            0 => format!("VACUUM FULL {table}"),
            1 if table.starts_with("table") => format!("CLUSTER {table} USING {table}_pkey"),
            2 => format!("ALTER TABLE {table} ADD COLUMN {column} float DEFAULT random()"),
            _ => format!("REINDEX TABLE {table}"),
        })
    }

    fn truncate(&mut self) -> anyhow::Result<String> {
        let (table, again) = (self.table(), self.below(4));
        let statement = format!("TRUNCATE {table}");
        self.run(&[&statement])?;
        if again > 0 {
            self.run(&[&rows(&table, 1000 * again)])?;
        }
        Ok(format!("{statement}, {} rows again", 1000 * again))
    }

    fn create_table(&mut self) -> anyhow::Result<String> {
        let (name, tablespace, count) = (self.name("table"), self.tablespace(), self.below(20_000));
        let persistence = if self.below(5) == 0 { "UNLOGGED" } else { "" };
        let columns = "(id integer PRIMARY KEY, k integer, body text, tags integer[])";
        let statement = format!("CREATE {persistence} TABLE {name} {columns} TABLESPACE {tablespace}");
        self.run(&[&statement, &rows(&name, count)])?;
        self.tables.push(name);
        Ok(format!("{statement}, {count} rows"))
    }

    fn drop_table(&mut self) -> anyhow::Result<String> {
        if self.tables.len() < 3 {
            return self.create_table();
        }
        let index = self.below(self.tables.len() as u32) as usize;
        let table = self.tables.swap_remove(index);
        self.one(format!("DROP TABLE {table}"))
    }

    fn create_index(&mut self) -> anyhow::Result<String> {
        let (name, table, tablespace) = (self.name("index"), self.table(), self.tablespace());
        let methods = ["gin (tags)", "brin (id) WITH (pages_per_range = 2)", "hash (k)", "btree (body, k)"];
        let methods =
            [&methods[..], &["gist (point(id, k))", "spgist (point(id, k))", "gin (tags) WITH (fastupdate = off)"]];
        let methods = methods.concat();
        let method = methods[self.below(methods.len() as u32) as usize];
        self.indexes.push(name.clone());
        self.one(format!("SET default_tablespace = {tablespace}; CREATE INDEX {name} ON {table} USING {method}"))
    }

    fn drop_index(&mut self) -> anyhow::Result<String> {
        match self.indexes.pop() {
            Some(index) => self.one(format!("DROP INDEX IF EXISTS {index}")),
            None => self.create_index(),
        }
    }

    fn move_table(&mut self) -> anyhow::Result<String> {
        let (table, tablespace) = (self.table(), self.tablespace());
        self.one(format!("ALTER TABLE {table} SET TABLESPACE {tablespace}"))
    }

    fn turn_logging(&mut self) -> anyhow::Result<String> {
        let (table, to) = (self.table(), ["LOGGED", "UNLOGGED"][self.below(2) as usize]);
        self.one(format!("ALTER TABLE {table} SET {to}"))
    }

    fn create_database(&mut self) -> anyhow::Result<String> {
        if self.databases.len() > 1 {
            return self.drop_database();
        }
        let (name, tablespace) = (self.name("database"), self.tablespace());
        let strategy = match self.host.server.version().major {
            ..15 => "",
            _ => ["STRATEGY file_copy", "STRATEGY wal_log"][self.below(2) as usize],
        };
        self.databases.push(name.clone());
        self.one(format!("CREATE DATABASE {name} TEMPLATE quiet TABLESPACE {tablespace} {strategy}"))
    }

    fn drop_database(&mut self) -> anyhow::Result<String> {
        match self.databases.pop() {
            Some(name) => self.one(format!("DROP DATABASE {name} WITH (FORCE)")),
            None => self.create_database(),
        }
    }

    fn move_database(&mut self) -> anyhow::Result<String> {
        let Some(name) = self.databases.last().cloned() else { return self.create_database() };
        let location = format!(
            "SELECT spcname FROM pg_database d JOIN pg_tablespace t ON t.oid = d.dattablespace WHERE datname = '{name}'"
        );
        let now = self.host.server.session()?.value(&location)?;
        let to = if now == "fast" { "pg_default" } else { "fast" };
        // Its own tables must not lie there yet.
        self.one(format!("ALTER DATABASE {name} SET TABLESPACE {to}"))
    }

    fn change_databases(&mut self) -> anyhow::Result<String> {
        let names: Vec<String> = self.databases.iter().cloned().chain(["quiet".to_owned()]).collect();
        let name = &names[self.below(names.len() as u32) as usize];
        let (part, own) = (self.below(50), self.name("own"));
        let session = self.host.server.session_in(name)?;
        session.execute(&format!("UPDATE lasting SET md5 = md5(md5) WHERE n % 50 = {part}"))?;
        session.execute(&format!("CREATE TABLE {own} AS SELECT * FROM lasting WHERE n % 50 < {part}"))?;
        Ok(format!("rows and a table in {name}"))
    }

    fn count_on(&mut self) -> anyhow::Result<String> {
        let (name, by) = (["counter", "cached"][self.below(2) as usize], 1 + self.below(70));
        self.one(format!("SELECT nextval('{name}') FROM generate_series(1, {by})"))
    }

    /// With a transaction under way half of the time, whose files stay behind.
    pub fn crash(&mut self) -> anyhow::Result<()> {
        let session = self.host.server.session()?;
        if self.below(2) == 0 {
            let table = self.table();
            session.execute("BEGIN")?;
            session.execute(&rows(&table, 3000))?;
            session.execute("CREATE TABLE never AS SELECT n, md5(n::text) FROM generate_series(1, 3000) n")?;
            if self.below(2) == 0 {
                self.run(&["CHECKPOINT"])?;
            }
        }
        self.host.server.stop(Shutdown::Immediate)?;
        drop(session);
        self.host.server.start()
    }

    fn roll_back(&mut self) -> anyhow::Result<String> {
        let (table, part) = (self.table(), self.below(97));
        let work =
            format!("UPDATE {table} SET k = 0 WHERE id % 97 = {part}; CREATE TABLE undone AS SELECT * FROM {table}");
        let session = self.host.server.session()?;
        for statement in ["BEGIN", &work, &rows(&table, 2000), "ROLLBACK"] {
            session.execute(statement)?;
        }
        Ok(format!("{work}, rolled back"))
    }

    /// A table of so many pages, by truncation if it has more, and perhaps on from there.
    fn climb(&mut self) -> anyhow::Result<String> {
        let stair = |at: u32| STAIRS[at as usize % STAIRS.len()];
        let (to, then) = (stair(self.below(10)), stair(self.below(10)));
        let cut = format!("DELETE FROM stair WHERE id > {to}");
        let fill = |to: u32| {
            let from = "(SELECT coalesce(max(id), 0) + 1 FROM stair)";
            format!("INSERT INTO stair SELECT n, rpad(n::text, 7000, 'x') FROM generate_series({from}, {to}) n")
        };
        self.run(&[&cut, "VACUUM stair", &fill(to)])?;
        let pages = "SELECT pg_relation_size('stair') / 8192";
        let found = self.host.server.session()?.number(pages)?;
        let again = self.below(2) == 0;
        if again {
            self.run(&[&fill(then)])?;
        }
        Ok(format!("stair to {to} ({found} pages), then {then}: {again}"))
    }

    fn small_things(&mut self) -> anyhow::Result<String> {
        let table = self.table();
        let all = [
            "CHECKPOINT".to_owned(),
            "SELECT pg_switch_wal()".to_owned(),
            format!("SELECT count(*), sum(k) FROM {table}"),
            "REFRESH MATERIALIZED VIEW event_count".to_owned(),
            "SELECT lo_from_bytea(0, decode(repeat(md5('another'), 1000), 'hex'))".to_owned(),
            format!("SELECT count(*) FROM (SELECT * FROM {table} WHERE id % 3 = 0 FOR UPDATE) locked"),
        ];
        let index = self.below(all.len() as u32) as usize;
        self.one(all[index].clone())
    }
}

/// More rows, behind those that are there.
fn rows(table: &str, count: u32) -> String {
    let from = format!("(SELECT coalesce(max(id), 0) FROM {table})");
    format!(
        "INSERT INTO {table} (id, k, body, tags) SELECT {from} + n, n % 1000, md5(n::text), ARRAY[n % 7, n % 11] \
         FROM generate_series(1, {count}) n"
    )
}
