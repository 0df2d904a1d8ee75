import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { FluxError } from "../../recipes/base/errors.ts";
import {
  alignedBytes,
  type FileDType,
  fileDTypeBits,
  fromSafetensorsDType,
  MAX_HEADER_BYTES,
  parseHeader,
  printable,
  SAFETENSORS_DTYPES,
  SafetensorsError,
  SafetensorsFile,
  type SafetensorsHeader,
  type SafetensorsRule,
  type TensorToWrite,
  toSafetensorsDType,
  writeSafetensors,
} from "../../recipes/base/safetensors.ts";
import {
  JsonNumber,
  parseStrictJson,
  type StrictJson,
  StrictJsonError,
} from "../../recipes/base/strict_json.ts";

/** Runs `body` with a fresh folder that is removed afterwards. */
async function inFolder(body: (folder: string) => Promise<void> | void): Promise<void> {
  const folder = Deno.makeTempDirSync({ prefix: "flux-safetensors-" });
  try {
    await body(folder);
  } finally {
    Deno.removeSync(folder, { recursive: true });
  }
}

/** A file's bytes from the text (or bytes) of its header and the number of data bytes. */
function fileOf(header: string | Uint8Array, dataBytes = 0): Uint8Array<ArrayBuffer> {
  const text = typeof header === "string" ? new TextEncoder().encode(header) : header;
  const bytes = new Uint8Array(8 + text.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
  bytes.set(text, 8);
  return bytes;
}

function parse(bytes: Uint8Array): SafetensorsHeader {
  return parseHeader(bytes, bytes.length, "x.safetensors");
}

function assertBreaks(rule: SafetensorsRule, bytes: Uint8Array, tensor?: string): void {
  assert.throws(() => parse(bytes), (error: unknown) => {
    assert(error instanceof SafetensorsError, String(error));
    assert(error instanceof FluxError);
    assert.equal(error.rule, rule, error.message);
    assert.equal(error.tensor, tensor);
    assert.equal(error.file, "x.safetensors");
    assert(error.message.startsWith("x.safetensors: "));
    assert(error.hint);
    return true;
  });
}

const F32_PAIR = '"dtype":"F32","shape":[2],"data_offsets":[0,8]';

Deno.test("reads the example of the reference implementation's test", () => {
  // huggingface/safetensors, safetensors/src/tensor.rs, test_serialization: the same header.
  const header = parse(fileOf('{"attn.0":{"dtype":"F32","shape":[1,2,3],"data_offsets":[0,24]}}', 24));
  assert.deepEqual([...header.tensors], [["attn.0", {
    dtype: "f32",
    shape: [1, 2, 3],
    byteOffset: 72,
    byteLength: 24,
  }]]);
  assert.equal(header.metadata.size, 0);
  assert.equal(header.dataOffset, 72);
});

Deno.test("accepts what the format allows", () => {
  assert.equal(parse(fileOf("{}")).tensors.size, 0);
  assert.equal(parse(fileOf("{} \n\t\r ")).tensors.size, 0);
  assert.deepEqual([...parse(fileOf('{"__metadata__":{"format":"pt","":""}}')).metadata], [
    ["format", "pt"],
    ["", ""],
  ]);
  const scalar = parse(fileOf('{"s":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}', 8));
  assert.deepEqual(scalar.tensors.get("s")!.shape, []);
  // Empty tensors lie anywhere between others, and two of them may share their place. Header order is free.
  const empty = parse(fileOf(
    '{"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]},"e2":{"dtype":"F32","shape":[0],"data_offsets":[1,1]},' +
      '"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"},"e1":{"dtype":"F32","shape":[7,0],"data_offsets":[1,1]}}',
    3,
  ));
  assert.deepEqual([...empty.tensors.keys()], ["a", "e2", "e1", "b"]);
  // Escaped keys of the format are those keys.
  parse(fileOf('{"t":{"\\u0064type":"U8","shape":[1],"data_offsets":[0,1]}}', 1));
});

Deno.test("names are data: prototypes, NUL, look-alikes, empty", () => {
  const names = [
    "__proto__",
    "constructor",
    "toString",
    "a\0b",
    "weight",
    "wеight",
    "ｗeight",
    "",
    "é",
    "e\u0301",
  ];
  const entries = names.map((name, i) =>
    `${JSON.stringify(name)}:{"dtype":"U8","shape":[1],"data_offsets":[${i},${i + 1}]}`
  );
  const header = parse(fileOf(`{${entries.join(",")}}`, names.length));
  assert.deepEqual([...header.tensors.keys()], names);
  assert.equal(Object.getPrototypeOf({}), Object.prototype);
  assert.equal(printable("wеight\x1b[2J\0"), '"w\\u{435}ight\\u{1b}[2J\\u{0}"');
  // What a terminal would act on does not get into a message.
  assert.throws(() => parse(fileOf('{"\\u001b[2J":1}')), (error: unknown) => {
    return error instanceof SafetensorsError && !error.message.includes("\x1b") && error.tensor === "\x1b[2J";
  });
});

Deno.test("each broken rule is named", async (t) => {
  const tensor = (fields: string, dataBytes = 8) => fileOf(`{"t":{${fields}}}`, dataBytes);
  const cases: [SafetensorsRule, string, Uint8Array, string?][] = [
    ["file-size", "empty file", new Uint8Array()],
    ["file-size", "7 bytes", new Uint8Array(7)],
    ["header-size", "header longer than the file", fileOf("{}").with(0, 3)],
    ["header-size", "header just over 100 MB", new Uint8Array(new BigUint64Array([100_000_001n, 0n]).buffer)],
    ["header-size", "header of 2^64-1", new Uint8Array(16).fill(255)],
    ["header-start", "header of no bytes", fileOf("")],
    ["header-start", "a list", fileOf("[]")],
    ["header-start", "space before {", fileOf(" {}")],
    ["header-start", "byte order mark", fileOf("\ufeff{}")],
    ["utf-8", "stray byte", fileOf(new Uint8Array([0x7b, 0xff, 0x7d]))],
    ["utf-8", "overlong encoding", fileOf(new Uint8Array([0x7b, 0x22, 0xc0, 0xa2, 0x22, 0x7d]))],
    ["utf-8", "encoded surrogate", fileOf(new Uint8Array([0x7b, 0x22, 0xed, 0xa0, 0x80, 0x22, 0x7d]))],
    ["json", "unfinished", fileOf('{"t":')],
    ["json", "single quotes", fileOf("{'t':1}")],
    ["json", "trailing comma", fileOf('{"__metadata__":{},}')],
    ["json", "two values", fileOf("{}{}")],
    ["json", "NUL padding", fileOf("{}\0\0")],
    ["json", "no-break space as padding", fileOf("{}\u00a0")],
    ["json", "form feed as padding", fileOf("{}\f")],
    ["json", "deep nesting", fileOf(`{"t":${"[".repeat(100_000)}`)],
    ["json", "half a surrogate pair", fileOf('{"\\ud800":1}')],
    ["json", "raw control character", fileOf('{"a\nb":1}')],
    ["json", "NaN", fileOf('{"t":NaN}')],
    ["json", "leading zero", fileOf('{"t":{"dtype":"U8","shape":[08],"data_offsets":[0,8]}}', 8)],
    ["json", "full-width digit", fileOf('{"t":{"dtype":"U8","shape":[８],"data_offsets":[0,8]}}', 8)],
    ["duplicate-key", "same tensor twice", fileOf(`{"t":{${F32_PAIR}},"t":{${F32_PAIR}}}`, 8)],
    ["duplicate-key", "same after unescaping", fileOf(`{"t":{${F32_PAIR}},"\\u0074":{${F32_PAIR}}}`, 8)],
    ["duplicate-key", "in a tensor", tensor(`${F32_PAIR},"shape":[2]`)],
    ["duplicate-key", "in the metadata", fileOf('{"__metadata__":{"a":"1","a":"1"}}')],
    ["duplicate-key", "metadata twice", fileOf('{"__metadata__":{},"__metadata__":{}}')],
    ["metadata", "a list", fileOf('{"__metadata__":[]}')],
    ["metadata", "null", fileOf('{"__metadata__":null}')],
    ["metadata", "a number in it", fileOf('{"__metadata__":{"a":1}}')],
    ["metadata", "an object in it", fileOf('{"__metadata__":{"a":{}}}')],
    ["tensor-keys", "not an object", fileOf('{"t":[]}'), "t"],
    ["tensor-keys", "no dtype", tensor('"shape":[2],"data_offsets":[0,8]'), "t"],
    ["tensor-keys", "no shape", tensor('"dtype":"F32","data_offsets":[0,8]'), "t"],
    ["tensor-keys", "no offsets", tensor('"dtype":"F32","shape":[2]'), "t"],
    ["tensor-keys", "one more", tensor(`${F32_PAIR},"strides":[1]`), "t"],
    [
      "tensor-keys",
      "inherited names do not count",
      tensor('"shape":[2],"data_offsets":[0,8],"toString":1'),
      "t",
    ],
    ["dtype", "unknown", tensor('"dtype":"F31","shape":[2],"data_offsets":[0,8]'), "t"],
    ["dtype", "lower case", tensor('"dtype":"f32","shape":[2],"data_offsets":[0,8]'), "t"],
    [
      "dtype",
      "a property of every object",
      tensor('"dtype":"toString","shape":[2],"data_offsets":[0,8]'),
      "t",
    ],
    ["dtype", "a number", tensor('"dtype":32,"shape":[2],"data_offsets":[0,8]'), "t"],
    ["shape", "a number", tensor('"dtype":"F32","shape":2,"data_offsets":[0,8]'), "t"],
    ["shape", "negative", tensor('"dtype":"F32","shape":[-2],"data_offsets":[0,8]'), "t"],
    ["shape", "minus zero", tensor('"dtype":"F32","shape":[-0],"data_offsets":[0,0]', 0), "t"],
    ["shape", "fraction", tensor('"dtype":"F32","shape":[2.0],"data_offsets":[0,8]'), "t"],
    ["shape", "exponent", tensor('"dtype":"F32","shape":[2e0],"data_offsets":[0,8]'), "t"],
    ["shape", "string", tensor('"dtype":"F32","shape":["2"],"data_offsets":[0,8]'), "t"],
    ["shape", "2^53", tensor('"dtype":"U8","shape":[9007199254740992],"data_offsets":[0,8]'), "t"],
    [
      "shape",
      "product that wraps to 8 in 64 bits",
      tensor('"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]', 0),
      "t",
    ],
    [
      "shape",
      "overflow before a 0",
      tensor('"dtype":"U8","shape":[99999999,999999999,0],"data_offsets":[0,0]', 0),
      "t",
    ],
    ["shape", "half a byte of F4", tensor('"dtype":"F4","shape":[3],"data_offsets":[0,2]', 2), "t"],
    ["shape", "6 bits of F6", tensor('"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]', 2), "t"],
    [
      "shape",
      "2^53+1 beside a 0",
      tensor('"dtype":"U8","shape":[0,9007199254740993],"data_offsets":[0,0]', 0),
      "t",
    ],
    [
      "offsets",
      "beyond 2^53",
      tensor('"dtype":"U8","shape":[0],"data_offsets":[9007199254740993,9007199254740993]'),
      "t",
    ],
    ["offsets", "one", tensor('"dtype":"F32","shape":[2],"data_offsets":[0]'), "t"],
    ["offsets", "three", tensor('"dtype":"F32","shape":[2],"data_offsets":[0,8,8]'), "t"],
    ["offsets", "negative", tensor('"dtype":"F32","shape":[2],"data_offsets":[-8,0]'), "t"],
    ["offsets", "backwards", tensor('"dtype":"F32","shape":[2],"data_offsets":[8,0]'), "t"],
    ["byte-size", "too few bytes", tensor('"dtype":"F32","shape":[3],"data_offsets":[0,8]'), "t"],
    ["byte-size", "too many bytes", tensor('"dtype":"F32","shape":[1],"data_offsets":[0,8]'), "t"],
    ["truncated", "a byte short", tensor(F32_PAIR, 7), "t"],
    [
      "truncated",
      "far away",
      tensor('"dtype":"U8","shape":[1],"data_offsets":[9007199254740990,9007199254740991]'),
      "t",
    ],
    ["gap", "nothing at 0", tensor('"dtype":"U8","shape":[7],"data_offsets":[1,8]'), "t"],
    [
      "gap",
      "between two",
      fileOf(
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        8,
      ),
      "b",
    ],
    [
      "overlap",
      "by a byte",
      fileOf(
        '{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}',
        8,
      ),
      "b",
    ],
    ["overlap", "the same bytes", fileOf(`{"a":{${F32_PAIR}},"b":{${F32_PAIR}}}`, 8), "b"],
    [
      "overlap",
      "empty one inside another",
      fileOf(`{"a":{${F32_PAIR}},"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}`, 8),
      "b",
    ],
    ["trailing-bytes", "one more", tensor(F32_PAIR, 9)],
    ["trailing-bytes", "data without tensors", fileOf("{}", 1)],
  ];
  for (const [rule, what, bytes, tensor] of cases) {
    await t.step(`${rule}: ${what}`, () => assertBreaks(rule, bytes, tensor));
  }
});

Deno.test("a header that claims more than it has never reads past the buffer it was given", () => {
  const bytes = fileOf(`{"t":{${F32_PAIR}}}`, 8);
  // The caller says the file is long enough, but hands over less than the header.
  assert.throws(() => parseHeader(bytes.subarray(0, 20), bytes.length, "f"), SafetensorsError);
});

Deno.test("dtype names map both ways and have the reference's sizes", () => {
  const bits: Record<string, number> = { F4: 4, F6_E2M3: 6, F6_E3M2: 6, BOOL: 8, C64: 64 };
  for (const dtype of SAFETENSORS_DTYPES) {
    const name = fromSafetensorsDType(dtype);
    assert.equal(name, dtype.toLowerCase().replace("_", ""));
    assert.equal(toSafetensorsDType(name), dtype);
    assert.equal(fileDTypeBits(name), bits[dtype] ?? Number(/\d+/.exec(dtype)![0]), dtype);
  }
  assert.equal(SAFETENSORS_DTYPES.length, 22);
});

// ---- properties ----

const anyName = fc.oneof(
  fc.string({ unit: "binary", maxLength: 12 }),
  fc.constantFrom("__proto__", "constructor", "a.weight", "a\0", "ﬀ", "\u{10000}", "\uffff"),
).filter((name) => name !== "__metadata__" && name.isWellFormed());

const anyDType = fc.constantFrom(...SAFETENSORS_DTYPES).map(fromSafetensorsDType);

/** Tensors with distinct names; sub-byte ones get a last dimension of 4, so that their bits fill whole bytes. */
const anyTensors = fc.uniqueArray(
  fc.record({
    name: anyName,
    dtype: anyDType,
    shape: fc.array(fc.nat(4), { maxLength: 3 }),
    seed: fc.nat(255),
  }),
  { selector: (tensor) => tensor.name, maxLength: 6 },
).map((tensors) =>
  tensors.map(({ name, dtype, shape, seed }): TensorToWrite & { bytes: Uint8Array } => {
    const bits = fileDTypeBits(dtype);
    const whole = bits < 8 ? [...shape, 4] : shape;
    const length = whole.reduce((product, size) => product * size, bits) / 8;
    return { name, dtype, shape: whole, bytes: Uint8Array.from({ length }, (_, i) => (seed + i * 7) & 255) };
  })
);

const anyMetadata = fc.uniqueArray(fc.tuple(anyName, fc.string({ maxLength: 5 })), {
  selector: ([key]) => key,
  maxLength: 3,
}).map((pairs) => new Map(pairs));

Deno.test("what the writer writes the reader reads, whatever the names, dtypes and shapes", () =>
  inFolder(async (folder) => {
    const path = join(folder, "round.safetensors");
    await fc.assert(
      fc.asyncProperty(anyTensors, anyMetadata, async (tensors, metadata) => {
        await writeSafetensors(path, tensors, metadata);
        using file = SafetensorsFile.open(path);
        assert.equal(file.mapped, true);
        assert.deepEqual(new Map(file.metadata), metadata);
        assert.deepEqual(new Set(file.names), new Set(tensors.map(({ name }) => name)));
        for (const { name, dtype, shape, bytes } of tensors) {
          const info = file.info(name);
          assert.deepEqual([info.dtype, info.shape], [dtype, shape]);
          assert.deepEqual(file.bytes(name), bytes);
          // Sorted by alignment, every tensor of whole bytes is aligned.
          const alignment = Math.max(1, fileDTypeBits(dtype) / 8);
          if (dtype !== "bool") assert.equal(info.byteOffset % alignment, 0);
        }
      }),
      { numRuns: 150 },
    );
    assert.deepEqual([...Deno.readDirSync(folder)].map((entry) => entry.name), ["round.safetensors"]);
  }));

/** The header's invariant: ranges inside the file, one after the other, covering it. */
function assertCovers(header: SafetensorsHeader, fileSize: number): void {
  let at = header.dataOffset;
  assert(at >= 8 && at <= fileSize);
  for (const { dtype, shape, byteOffset, byteLength } of header.tensors.values()) {
    assert.equal(byteOffset, at);
    assert.equal(byteLength * 8, shape.reduce((product, size) => product * size, fileDTypeBits(dtype)));
    at += byteLength;
  }
  assert.equal(at, fileSize);
}

type Tree = null | number | string | boolean | Tree[] | [string, Tree][] & { readonly object: true };

/** JSON text of a tree in which objects are lists of pairs, so that keys may repeat. */
function write(tree: Tree): string {
  if (typeof tree !== "object" || tree === null) return JSON.stringify(tree);
  if ("object" in tree) {
    return `{${tree.map(([key, value]) => `${JSON.stringify(key)}:${write(value)}`).join(",")}}`;
  }
  return `[${tree.map(write).join(",")}]`;
}

function object(...pairs: [string, Tree][]): Tree {
  return Object.assign(pairs, { object: true } as const);
}

const strangeInteger = fc.oneof(
  { weight: 3, arbitrary: fc.integer({ min: -8, max: 40 }) },
  fc.constantFrom(2 ** 31, 2 ** 32, 2 ** 53 - 1, 2 ** 53, 2 ** 63, 2 ** 64, 1.5, -0, 1e300),
);
const strangeValue: fc.Arbitrary<Tree> = fc.oneof(
  strangeInteger,
  fc.constantFrom<Tree>(null, true, "", "F32", "__proto__", [], [0], [0, 8], object(), object(["a", "b"])),
);

/** null mostly, else a value. */
function rarely<T>(value: fc.Arbitrary<T>): fc.Arbitrary<T | null> {
  return fc.oneof({ weight: 20, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: value });
}

/** A header of a few tensors, each field right with high probability and anything at all otherwise. */
const mutatedHeader = fc.array(
  fc.record({
    rename: rarely(fc.constantFrom("t0", "__proto__", "__metadata__", "t\u0430")),
    dtype: fc.oneof({ weight: 30, arbitrary: fc.constantFrom(...SAFETENSORS_DTYPES) }, {
      weight: 1,
      arbitrary: strangeValue,
    }),
    count: fc.nat(6),
    shape: rarely(fc.oneof(strangeValue, fc.array(strangeInteger, { maxLength: 3 }))),
    shift: fc.oneof({ weight: 25, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: strangeInteger }),
    stretch: fc.oneof({ weight: 25, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: strangeInteger }),
    extra: rarely(fc.tuple(fc.constantFrom("dtype", "shape", "data_offsets", "x"), strangeValue)),
    drop: rarely(fc.nat(2)),
  }),
  { maxLength: 4 },
).chain((tensors) => {
  let at = 0;
  const pairs = tensors.map(
    ({ rename, dtype, count, shape, shift, stretch, extra, drop }, i): [string, Tree] => {
      const bits = typeof dtype === "string" && (SAFETENSORS_DTYPES as readonly string[]).includes(dtype)
        ? fileDTypeBits(fromSafetensorsDType(dtype as (typeof SAFETENSORS_DTYPES)[number]))
        : 8;
      const elements = count * 4;
      const begin = at + shift;
      at += (elements * bits) / 8;
      const fields: [string, Tree][] = [
        ["dtype", dtype],
        ["shape", shape === null ? [elements] : shape],
        ["data_offsets", [begin, at + shift + stretch]],
      ];
      if (drop !== null) fields.splice(drop, 1);
      if (extra !== null) fields.push(extra);
      return [rename ?? `t${i}`, object(...fields)];
    },
  );
  const data = fc.oneof({ weight: 20, arbitrary: fc.constant(at) }, { weight: 1, arbitrary: fc.nat(64) });
  const order = fc.shuffledSubarray(pairs, { minLength: pairs.length });
  return fc.tuple(order, data).map(([shuffled, dataBytes]) => fileOf(write(object(...shuffled)), dataBytes));
});

/** Valid files with bytes flipped, cut, inserted or doubled anywhere. */
const flipped = fc.tuple(
  fc.constantFrom(
    fileOf(
      `{"__metadata__":{"format":"pt"},"a":{${F32_PAIR}},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}`,
      9,
    ),
    fileOf(`{"a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}    `, 4),
    fileOf(`{}`),
  ),
  fc.array(
    fc.record({
      at: fc.nat(200),
      how: fc.constantFrom("flip", "flip", "set", "cut", "insert", "end"),
      value: fc.oneof(
        fc.nat(255),
        fc.constantFrom(...[...'{}[]",:0123456789-.eE\\u \n\0'].map((c) => c.charCodeAt(0))),
      ),
    }),
    { minLength: 1, maxLength: 4 },
  ),
).map(([file, changes]) => {
  const bytes = [...file];
  for (const { at, how, value } of changes) {
    const i = bytes.length === 0 ? 0 : at % bytes.length;
    if (how === "flip") bytes[i] ^= 1 << (value & 7);
    else if (how === "set") bytes[i] = value;
    else if (how === "cut") bytes.splice(i, 1);
    else if (how === "insert") bytes.splice(i, 0, value);
    else bytes.splice(i);
  }
  return Uint8Array.from(bytes);
});

Deno.test("2,000 mutated files: either a header that covers the file exactly, or a SafetensorsError", () => {
  let accepted = 0;
  const rules = new Map<SafetensorsRule, number>();
  fc.assert(
    fc.property(
      fc.oneof({ weight: 2, arbitrary: mutatedHeader }, { weight: 1, arbitrary: flipped }),
      (bytes) => {
        let header: SafetensorsHeader;
        try {
          header = parse(bytes);
        } catch (error) {
          if (!(error instanceof SafetensorsError)) throw error;
          rules.set(error.rule, (rules.get(error.rule) ?? 0) + 1);
          return;
        }
        accepted++;
        assertCovers(header, bytes.length);
        // What we accept, JSON.parse reads the same way.
        const text = new TextDecoder().decode(bytes.subarray(8, header.dataOffset));
        const entries = Object.entries(JSON.parse(text)).filter(([name]) => name !== "__metadata__");
        const plain = new Map(
          entries as [string, { dtype: string; shape: number[]; data_offsets: number[] }][],
        );
        assert.deepEqual(new Set(plain.keys()), new Set(header.tensors.keys()));
        for (const [name, info] of header.tensors) {
          const { dtype, shape, data_offsets: [begin] } = plain.get(name)!;
          assert.deepEqual([info.shape, info.byteOffset], [shape, header.dataOffset + begin]);
          assert.equal(toSafetensorsDType(info.dtype), dtype);
        }
      },
    ),
    { numRuns: 2000 },
  );
  // The mutations are no use if they are all refused for one reason: all kinds of outcome must occur.
  assert(accepted > 100, `only ${accepted} accepted`);
  assert(rules.size >= 12, [...rules].join(" "));
});

Deno.test("the strict JSON reader agrees with JSON.parse on every JSON value", () => {
  const plain = (value: StrictJson): unknown => {
    if (value instanceof JsonNumber) return Number(value.text);
    if (Array.isArray(value)) return value.map(plain);
    if (value instanceof Map) return new Map(Array.from(value, ([key, item]) => [key, plain(item)]));
    return value;
  };
  const mapped = (value: unknown): unknown => {
    if (Array.isArray(value)) return value.map(mapped);
    if (typeof value === "object" && value !== null) {
      return new Map(Object.entries(value).map(([key, item]) => [key, mapped(item)]));
    }
    return value;
  };
  fc.assert(fc.property(fc.json({ maxDepth: 4 }), (text) => {
    const ours = plain(parseStrictJson(text));
    // JSON.parse moves integer-like keys to the front: compare as sets of entries.
    assert.deepEqual(ours, mapped(JSON.parse(text)));
  }));
  // And whatever JSON.parse refuses it refuses too.
  const fragment = fc.array(fc.constantFrom(...'{}[]:,"\\u0aé-+.eE1 \ntruefalsn'.split("")), {
    maxLength: 8,
  });
  fc.assert(
    fc.property(fragment, (parts) => {
      const text = parts.join("");
      try {
        parseStrictJson(text);
      } catch (error) {
        assert(error instanceof StrictJsonError);
        return;
      }
      JSON.parse(text);
    }),
    { numRuns: 3000 },
  );
});

// ---- files ----

Deno.test("the writer's bytes are those of the reference implementation", () =>
  inFolder(async (folder) => {
    const path = join(folder, "fp4.safetensors");
    // huggingface/safetensors, safetensors/src/tensor.rs, test_serialization_fp4 and test_empty.
    await writeSafetensors(path, [{ name: "attn.0", dtype: "f4", shape: [1, 2], bytes: new Uint8Array(1) }]);
    assert.deepEqual(
      Deno.readFileSync(path),
      fileOf('{"attn.0":{"dtype":"F4","shape":[1,2],"data_offsets":[0,1]}}    ', 1),
    );
    await writeSafetensors(path, []);
    assert.deepEqual(Deno.readFileSync(path), fileOf("{}      "));
    // Sorted by alignment, largest first, then by the names' UTF-8 bytes (U+FFFF before U+10000).
    const one = (name: string, dtype: FileDType) => ({
      name,
      dtype,
      shape: [2],
      bytes: new Uint8Array(fileDTypeBits(dtype) / 4),
    });
    await writeSafetensors(
      path,
      [one("a", "u8"), one("\u{10000}", "f32"), one("\uffff", "f32"), one("b", "bool"), one("z", "i64")],
      { format: "pt" },
    );
    using file = SafetensorsFile.open(path);
    assert.deepEqual(file.names, ["z", "\uffff", "\u{10000}", "a", "b"]);
    assert.deepEqual([...file.metadata], [["format", "pt"]]);
  }));

Deno.test("tensors may be made while they are written; a wrong one leaves no file behind", () =>
  inFolder(async (folder) => {
    const path = join(folder, "lazy.safetensors");
    const order: string[] = [];
    const lazy = (name: string, length: number): TensorToWrite => ({
      name,
      dtype: "u8",
      shape: [4],
      bytes: async () => {
        order.push(name);
        await Promise.resolve();
        return new Uint8Array(length).fill(name.charCodeAt(0));
      },
    });
    await writeSafetensors(path, [lazy("b", 4), lazy("a", 4)]);
    assert.deepEqual(order, ["a", "b"]);
    const before = Deno.readFileSync(path);
    await assert.rejects(writeSafetensors(path, [lazy("a", 4), lazy("b", 5)]), SafetensorsError);
    assert.deepEqual(Deno.readFileSync(path), before); // the old file is still whole
    assert.deepEqual([...Deno.readDirSync(folder)].map((entry) => entry.name), ["lazy.safetensors"]);
  }));

Deno.test("the writer tells how far it is, and when it is stopped the old file stays and nothing else", () =>
  inFolder(async (folder) => {
    const path = join(folder, "t.safetensors");
    const tensors = ["a", "b", "c"].map((name): TensorToWrite => ({
      name,
      dtype: "bf16",
      shape: [1000, 1000],
      bytes: () => new Uint8Array(2_000_000).fill(name.charCodeAt(0)),
    }));
    const seen: [number, number][] = [];
    const size = await writeSafetensors(path, tensors, {}, { onBytes: (...now) => seen.push(now) });
    assert.equal(size, Deno.statSync(path).size);
    assert.deepEqual([seen[0], seen.at(-1)], [[0, size], [size, size]]);
    assert.deepEqual(seen, seen.toSorted(([a], [b]) => a - b));

    const before = Deno.readFileSync(path);
    for (const part of [0, 0.3, 0.9, 1]) {
      const controller = new AbortController();
      const reason = new RangeError("enough");
      const onBytes = (written: number) => written >= part * size && controller.abort(reason);
      await assert.rejects(
        writeSafetensors(path, tensors, {}, { signal: controller.signal, onBytes }),
        (error) => error === reason,
        `stopped at ${part}`,
      );
      assert.deepEqual(Deno.readFileSync(path), before);
      assert.deepEqual([...Deno.readDirSync(folder)].map(({ name }) => name), ["t.safetensors"]);
    }
  }));

Deno.test("the writer refuses what the reader would refuse, and writes nothing", () =>
  inFolder(async (folder) => {
    const path = join(folder, "bad.safetensors");
    const tensor = (changes: Partial<TensorToWrite>): TensorToWrite => ({
      name: "t",
      dtype: "u8",
      shape: [1],
      bytes: new Uint8Array(1),
      ...changes,
    });
    const cases: [SafetensorsRule, TensorToWrite[]][] = [
      ["duplicate-key", [tensor({}), tensor({})]],
      ["tensor-name", [tensor({ name: "__metadata__" })]],
      ["json", [tensor({ name: "\ud800" })]],
      ["byte-size", [tensor({ shape: [2] })]],
      ["shape", [tensor({ shape: [-1] })]],
      ["shape", [tensor({ shape: [0.5, 2] })]],
      ["shape", [tensor({ dtype: "f4", shape: [1] })]],
      ["shape", [tensor({ dtype: "f31" as FileDType })]],
    ];
    for (const [rule, tensors] of cases) {
      await assert.rejects(
        writeSafetensors(path, tensors),
        (error: unknown) => error instanceof SafetensorsError && error.rule === rule,
        rule,
      );
    }
    assert.deepEqual([...Deno.readDirSync(folder)], []);
  }));

Deno.test("an open file: names, views, pointers, and typed errors after it was closed", () =>
  inFolder(async (folder) => {
    const path = join(folder, "w.safetensors");
    const values = Float32Array.from([1.5, -2, 3]);
    await writeSafetensors(path, [
      { name: "w", dtype: "f32", shape: [3], bytes: new Uint8Array(values.buffer) },
      { name: "e", dtype: "bf16", shape: [0, 4], bytes: new Uint8Array() },
    ]);
    const file = SafetensorsFile.open(path);
    const bytes = file.bytes("w");
    assert.deepEqual(new Float32Array(bytes.buffer, bytes.byteOffset, 3), values);
    const view = new Deno.UnsafePointerView(Deno.UnsafePointer.create(file.pointer("w"))!);
    assert.equal(view.getFloat32(4), -2);
    assert.equal(file.bytes("e").length, 0);
    assert.equal(file.has("w"), true);
    assert.equal(file.has("v"), false);
    const failsWith = (rule: SafetensorsRule) => (error: unknown) =>
      error instanceof SafetensorsError && error.rule === rule && error.file === path;
    for (const ask of [() => file.info("v"), () => file.bytes("v"), () => file.pointer("toString")]) {
      assert.throws(ask, failsWith("unknown-tensor"));
    }
    file[Symbol.dispose]();
    assert.throws(() => file.bytes("w"), failsWith("closed"));
    assert.throws(() => file.pointer("w"), failsWith("closed"));
    assert.equal(bytes.length, 0);
    assert.deepEqual(file.info("w").shape, [3]); // the header is ours, not the file's
  }));

Deno.test("files that cannot be opened: one typed error with the path", () =>
  inFolder((folder) => {
    const failsToOpen = (error: unknown) => error instanceof SafetensorsError && error.rule === "open";
    assert.throws(() => SafetensorsFile.open(join(folder, "none.safetensors")), failsToOpen);
    assert.throws(() => SafetensorsFile.open(folder), failsToOpen);
    Deno.writeFileSync(join(folder, "empty.safetensors"), new Uint8Array());
    assert.throws(
      () => SafetensorsFile.open(join(folder, "empty.safetensors")),
      (error: unknown) => error instanceof SafetensorsError && error.rule === "file-size",
    );
  }));

Deno.test("a header of 100 MB is within the limit, one byte more is not", () => {
  const sized = (size: number) => new Uint8Array(new BigUint64Array([BigInt(size), 0n]).buffer);
  // Only the size is there, so both are refused: the first for its missing bytes, the second for the limit.
  assert.throws(() => parseHeader(sized(MAX_HEADER_BYTES), 2e8, "f"), /the file has 200000000 in all/);
  assert.throws(() => parseHeader(sized(MAX_HEADER_BYTES + 1), 2e8, "f"), /limit is 100 MB/);
});

Deno.test("alignedBytes copies only what is not aligned", () => {
  const buffer = new Uint8Array(32);
  const aligned = buffer.subarray(8, 16);
  assert.equal(alignedBytes(aligned, 4), aligned);
  const odd = buffer.subarray(1, 9);
  odd[0] = 5;
  const copy = alignedBytes(odd, 4);
  assert.notEqual(copy.buffer, odd.buffer);
  assert.equal(copy[0], 5);
});
