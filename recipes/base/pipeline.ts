import { setImmediate } from "node:timers";
import type { Device } from "../../ffi/device.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type FiniteAnswer, issueAllFinite } from "../../kernels/all_finite.ts";
import { BOX_MULLER_BLOCK, boxMuller } from "../../kernels/box_muller.ts";
import { decode, encode, spatialFactor } from "./autoencoder.ts";
import { clipPooled, clipTextModel, endOfTextPositions } from "./clip.ts";
import { ModelError, UsageError } from "./errors.ts";
import { fitReference, pixelTensor, type Size, withReference } from "./kontext.ts";
import { packLatents, positionIds, type TokenGrid, unpackLatents } from "./latents.ts";
import { type Mark, mark } from "./mark.ts";
import type { Model } from "./model.ts";
import { fluxModulations } from "./modulations.ts";
import type { Ops } from "./ops.ts";
import type { Plan, StepInputs } from "./plan.ts";
import { Generator } from "./random.ts";
import { type Rotary, rotaryEmbedding } from "./rotary.ts";
import { relativePositionBuckets, t5Encoder } from "./t5.ts";
import type { TextTokenizer } from "./tokenizer.ts";
import { fluxTransformer } from "./transformer.ts";

/** What is drawn. Names and defaults are those of diffusers' FluxPipeline where not said otherwise. */
export interface GenerateOptions {
  /** What to draw; a list draws as many pictures together. */
  readonly prompt: string | readonly string[];
  /**
   * For T5; CLIP always reads `prompt`. `prompt` when left out, "" or an empty list; an empty text in a list stays
   * empty. As in diffusers.
   */
  readonly prompt2?: string | readonly string[];
  /** The picture to edit, for all prompts: for FLUX.1-Kontext, which draws from the prompt alone without one. */
  readonly image?: Picture;
  /**
   * Whether `image` is resized to the one of Kontext's preferred sizes that is nearest in shape, as diffusers' `_auto_resize`
   * does; true when left out. Else it keeps its size, rounded down to multiples of 16.
   */
  readonly autoResize?: boolean;
  /** In pixels, at most 8192; the autoencoder's `sample_size` when left out. Rounded down to a multiple of 16. */
  readonly height?: number;
  /** As `height`. */
  readonly width?: number;
  /** At most 1000; 4 for models without guidance embedding (schnell), 28 for those with one (dev). */
  readonly numInferenceSteps?: number;
  /**
   * Noise levels before the shift, one for each step, instead of even ones. From 0 to 1: diffusers takes larger ones
   * too, but they mean more noise than the model was ever trained on.
   */
  readonly sigmas?: readonly number[];
  /** 3.5 when left out, 2.5 for FLUX.1-Kontext; read by models with a guidance embedding only. */
  readonly guidanceScale?: number;
  /** Of the starting latents, as `torch.Generator("cpu").manual_seed(seed)`. Drawn at random when left out. */
  readonly seed?: bigint | number;
  /** At most 1000. */
  readonly numImagesPerPrompt?: number;
  /** T5 tokens; 256 for schnell, 512 for dev, never more than its tokenizer's `model_max_length` when left out. */
  readonly maxSequenceLength?: number;
  /** Called before the first step and after each; what it returns is ignored. */
  readonly onProgress?: (event: ProgressEvent) => void;
  /** Called with things worth knowing that do not stop the drawing. */
  readonly onWarning?: (message: string) => void;
  /**
   * Stops the work; the promise rejects with the signal's reason. It is looked at before and between the two text
   * encoders, before each step, and before and after the decoder: one of these that has begun is finished first.
   */
  readonly signal?: AbortSignal;
}

/** Reported when the text is encoded (`step` 0) and after each denoising step. */
export interface ProgressEvent {
  /** Steps done, 0 to `steps`. */
  readonly step: number;
  /** Steps in all. */
  readonly steps: number;
  /** Noise level after this step. */
  readonly sigma: number;
  /** Latents after this step, f32 `[batch, latent_channels, height / 8, width / 8]`; gone when the callback returns. */
  readonly latents: () => Tensor;
}

/** One picture: 8-bit RGB, row by row. */
export interface Picture {
  /** In pixels. */
  readonly width: number;
  /** In pixels. */
  readonly height: number;
  /** `[height, width, 3]`. */
  readonly rgb: Uint8Array;
}

/** What {@link FluxPipeline.generate} gives. */
export interface GenerateResult {
  /** `prompts * numImagesPerPrompt`, those of one prompt behind one another. */
  readonly images: readonly Picture[];
  /** What was used, all defaults filled in. */
  readonly settings: {
    readonly height: number;
    readonly width: number;
    readonly numInferenceSteps: number;
    readonly guidanceScale: number;
    readonly seed: bigint;
    readonly maxSequenceLength: number;
    /** Size of the picture to edit as it was encoded. */
    readonly image?: Size;
  };
  /** When the first part began, on the clock of `performance.now()`; the others follow without gaps. */
  readonly started: number;
  /** Wall-clock milliseconds by part, of a GPU's work. */
  readonly milliseconds: {
    readonly text: number;
    /** The autoencoder's encoder; 0 without a picture to edit. */
    readonly image: number;
    readonly steps: readonly number[];
    readonly decode: number;
    /** Of that, rounding to 8-bit pixels and their way to the host. */
    readonly pixels: number;
  };
  /** The steps, counted from 0, that were not computed in full, where a recipe allows it. */
  readonly reusedSteps?: readonly number[];
}

/** What a step has given, or what the first one starts from, and the point in the device's work where it is there. */
interface Denoised {
  readonly step: number;
  readonly latents: Tensor;
  readonly end: Mark;
}

/** T5 knows no more positions in FLUX.1's training. */
export const MAX_SEQUENCE_LENGTH = 512;
/** Of height and width. More than any model draws, little enough to say no in time. */
export const MAX_SIDE = 8192;
export const MAX_STEPS = 1000;
const MAX_IMAGES = 1000;
/** Rows of modulations that are computed at a time, for as many steps as that gives: 67 MB in bfloat16. */
const MODULATION_ROWS = 32;

/** Text to image: tokenize, encode, denoise, decode (diffusers' `pipelines/flux/pipeline_flux.py`). */
export class FluxPipeline {
  #lastRotary: { readonly size: string; readonly rotary: Rotary } | undefined;

  /** A pipeline that draws with `plan`, which was made of the weights of `model`; it owns neither. */
  constructor(readonly model: Model, readonly plan: Plan) {}

  /**
   * Draws pictures.
   *
   * @throws UsageError for values that make no sense, and when the model was disposed (before or meanwhile);
   * ModelError when it computes NaN or infinity; OutOfMemoryError; the signal's reason when it aborts.
   */
  async generate(options: GenerateOptions): Promise<GenerateResult> {
    const { plan: { device, ops }, model: { configs, scheduler } } = this;
    this.model.checkOpen();
    const image = this.#reference(options);
    const settings = this.#settings(options, image);
    const { height, width, numInferenceSteps: steps } = settings;
    const { signal, onProgress } = options;
    const prompts = listOf(options.prompt);
    const prompts2 = options.prompt2?.length ? listOf(options.prompt2) : prompts;
    if (prompts.length === 0) throw new UsageError("no prompt was given");
    if (prompts2.length !== prompts.length) {
      throw new UsageError(`${prompts.length} prompts, but ${prompts2.length} second prompts`);
    }
    const images = positiveInteger("numImagesPerPrompt", options.numImagesPerPrompt ?? 1, MAX_IMAGES);
    const batch = prompts.length * images;
    const factor = spatialFactor(configs.vae);
    const [latentHeight, latentWidth] = [height / factor, width / factor];
    const tokens = latentHeight / 2 * (latentWidth / 2);
    const schedule = scheduler.sigmas(steps, {
      imageSequenceLength: tokens,
      ...(options.sigmas === undefined ? {} : { sigmas: options.sigmas }),
    });

    const owned: Tensor[] = []; // what lives across awaits, where no scope reaches
    const own = <T extends Tensor | Tensor[]>(value: T): T => {
      owned.push(...[value].flat() as Tensor[]);
      return value;
    };
    const drop = (tensor: Tensor) => {
      owned.splice(owned.indexOf(tensor), 1);
      tensor.dispose();
    };
    /** Lets timers and signals in between two long computations, and goes on if the work still makes sense. */
    const pause = async () => {
      await new Promise((resolve) => setImmediate(resolve)); // a timer would wake up a millisecond later
      signal?.throwIfAborted();
      this.model.checkOpen();
    };
    using marks = new DisposableStack();
    const marked = () => marks.use(mark(device));
    try {
      await pause();
      const started = marked();
      // T5 first: a GPU is busy with it for long, and the host prepares all else meanwhile.
      const embeds = own(this.encodeT5(prompts2, images, settings.maxSequenceLength, options.onWarning));
      await pause();
      const pooled = own(this.encodeClip(prompts, images, options.onWarning));
      const grids = [{ rows: latentHeight / 2, columns: latentWidth / 2 }];
      if (image !== undefined) {
        grids.push({ rows: image.height / factor / 2, columns: image.width / factor / 2 });
      }
      const rotary = this.#rotary(settings.maxSequenceLength, grids);
      const noise = own(this.prepareLatents(settings.seed, batch, latentHeight, latentWidth));
      const encoded = marked();

      let imageLatents: Tensor | undefined;
      if (image !== undefined) {
        await pause();
        imageLatents = own(this.encodeImage(image, batch));
      }

      const report = ({ step, latents }: Denoised) => {
        if (onProgress === undefined) return;
        device.scope(() => {
          onProgress({
            step,
            steps,
            sigma: schedule.sigmas[step],
            latents: () => unpackLatents(ops, latents, latentHeight, latentWidth),
          });
        });
      };
      using stepper = this.plan.stepper?.(this.plan, configs.transformer);
      // A GPU has its next step issued before anybody waits for the last one, so that it need not wait either.
      const ahead = isGpu(device) && stepper === undefined ? 1 : 0;
      let newest: Denoised = { step: 0, latents: noise, end: image === undefined ? encoded : marked() };
      const ends = [newest.end];
      const unreported = [newest];
      /** Waits for steps and reports them, until no more than `most` are left. */
      const settle = async (most: number) => {
        while (unreported.length > most) {
          await unreported[0].end.reached();
          const done = unreported.shift()!;
          report(done);
          if (done !== newest) drop(done.latents);
        }
      };
      await settle(ahead);
      const together = Math.max(1, Math.floor(MODULATION_ROWS / batch));
      let modulations: Tensor | undefined;
      for (let step = 0; step < steps; step++) {
        await pause();
        if (step % together === 0) {
          if (modulations !== undefined) drop(modulations);
          const times = [...schedule.timesteps.slice(step, step + together)];
          modulations = own(this.#modulations(pooled, times, settings.guidanceScale));
        }
        const inputs: StepInputs = {
          latents: newest.latents,
          embeds,
          imageLatents,
          rotary,
          modulations: modulations!.narrow(0, step % together * batch, batch),
          change: schedule.sigmas[step + 1] - schedule.sigmas[step],
        };
        const latents = own(
          stepper === undefined ? device.scope(() => this.#denoise(inputs)) : await stepper.step(inputs),
        );
        const before = newest;
        newest = { step: step + 1, latents, end: marked() };
        ends.push(newest.end);
        unreported.push(newest);
        if (!unreported.includes(before)) drop(before.latents);
        await settle(ahead);
      }

      await pause();
      const { latents } = newest;
      using denoised = issueAllFinite(latents);
      if (ahead === 0) await requireFinite("denoising", denoised);
      const pictures = own(this.decodeLatents(latents, latentHeight, latentWidth));
      using decoded = issueAllFinite(pictures);
      const drawn = marked();
      const pixels = own(ops.toPixels(pictures));
      // Touched while the decoder runs: fresh pages take the host longer than the copy into them.
      const bytes = new Uint8Array(batch * height * width * 3).fill(0);
      await settle(0);
      await marked().reached();
      await requireFinite("denoising", denoised);
      await requireFinite("the autoencoder", decoded);
      await device.download(pixels, bytes);
      signal?.throwIfAborted();
      const size = height * width * 3;
      const stepTimes = ends.slice(1).map((end, i) => end.since(ends[i]));
      const [text, imageTime] = [encoded.since(started), ends[0].since(encoded)];
      const decode = performance.now() - started.made -
        stepTimes.reduce((sum, time) => sum + time, text + imageTime);
      return {
        images: Array.from({ length: batch }, (_, i) => ({
          width,
          height,
          rgb: bytes.subarray(i * size, (i + 1) * size),
        })),
        settings,
        started: started.made,
        milliseconds: {
          text,
          image: imageTime,
          steps: stepTimes,
          decode,
          pixels: Math.max(0, decode - drawn.since(newest.end)),
        },
        ...(stepper && { reusedSteps: stepper.reused }),
      };
    } finally {
      for (const tensor of owned) tensor.dispose();
    }
  }

  /**
   * CLIP's part of the text.
   *
   * @param images how often each prompt is repeated in the batch.
   * @returns the pooled output `[prompts * images, pooled_projection_dim]`; the caller frees it.
   */
  encodeClip(prompts: readonly string[], images: number, onWarning?: (message: string) => void): Tensor {
    this.model.checkOpen();
    const { plan: { device, ops, weights, execute }, model: { configs, clipTokenizer } } = this;
    const rows = tokenize("CLIP", clipTokenizer, prompts, clipTokenizer.modelMaxLength, onWarning);
    return device.scope(() => {
      const lastHiddenState = execute(
        this.plan,
        "text_encoder",
        [idTensor(device, rows)],
        ([ids]) => clipTextModel(configs.text_encoder, weights.text_encoder, ops, ids),
      );
      const pooled = clipPooled(ops, lastHiddenState, endOfTextPositions(configs.text_encoder, rows));
      return repeated(ops, pooled, images);
    });
  }

  /**
   * T5's part of the text.
   *
   * @param images how often each prompt is repeated in the batch.
   * @returns T5's output `[prompts * images, maxSequenceLength, joint_attention_dim]`; the caller frees it.
   */
  encodeT5(
    prompts: readonly string[],
    images: number,
    maxSequenceLength: number,
    onWarning?: (message: string) => void,
  ): Tensor {
    this.model.checkOpen();
    const { plan: { device, ops, weights, execute }, model: { configs, t5Tokenizer } } = this;
    const rows = tokenize("T5", t5Tokenizer, prompts, maxSequenceLength, onWarning);
    return device.scope(() => {
      const [tokens] = rows.map(({ length }) => length);
      const positions = relativePositionBuckets(configs.text_encoder_2, tokens);
      const embeds = execute(
        this.plan,
        "text_encoder_2",
        [idTensor(device, rows), Tensor.fromInt32(device, positions, [tokens, tokens])],
        ([ids, buckets]) => t5Encoder(configs.text_encoder_2, weights.text_encoder_2, ops, ids, buckets),
      );
      return repeated(ops, embeds, images);
    });
  }

  /**
   * The noise that a picture starts from, drawn as diffusers draws it: from torch's CPU generator, in the model's
   * dtype.
   *
   * @returns packed f32 `[batch, tokens, channels]`; the caller frees it.
   */
  prepareLatents(seed: bigint | number, batch: number, latentHeight: number, latentWidth: number): Tensor {
    const { plan: { device, ops, weights }, model: { configs } } = this;
    const shape = [batch, configs.vae.latent_channels, latentHeight, latentWidth];
    const count = shape.reduce((a, b) => a * b);
    const generator = new Generator(seed);
    const { dtype } = weights.transformer.get("x_embedder.weight");
    return device.scope(() => {
      let noise: Tensor;
      if (isGpu(device) && count % BOX_MULLER_BLOCK === 0) {
        noise = boxMuller(Tensor.fromFloat32(device, generator.uniforms(count), [count]), dtype).reshape(
          shape,
        );
      } else if (dtype === "bf16") {
        noise = Tensor.fromBytes(device, new Uint8Array(generator.randnBfloat16(count).buffer), shape, dtype);
      } else {
        noise = Tensor.fromFloat32(device, generator.randn(count), shape);
      }
      return packLatents(ops, ops.cast(noise, "f32"));
    });
  }

  /**
   * A picture to edit as the transformer reads it: its latents' mode.
   *
   * @param image each side a multiple of 16. @param batch how often it is repeated.
   * @returns packed `[batch, tokens, channels]` in the weights' dtype; the caller frees it.
   */
  encodeImage(image: Picture, batch: number): Tensor {
    this.model.checkOpen();
    const { plan: { device, ops, weights, execute }, model: { configs } } = this;
    return device.scope(() => {
      const encoded = execute(
        this.plan,
        "vae_encoder",
        [pixelTensor(device, image)],
        ([pixels]) => packLatents(ops, encode(configs.vae, weights.vae, ops, pixels)),
      );
      return repeated(ops, encoded, batch);
    });
  }

  /**
   * Packed latents `[batch, tokens, channels]` to pictures.
   *
   * @returns f32 `[batch, 3, height, width]`, about -1..1; the caller frees it.
   */
  decodeLatents(latents: Tensor, latentHeight: number, latentWidth: number): Tensor {
    this.model.checkOpen();
    const { plan: { device, ops, weights, execute }, model: { configs } } = this;
    return device.scope(() =>
      execute(this.plan, "vae", [latents], ([packed]) =>
        ops.cast(
          decode(configs.vae, weights.vae, ops, unpackLatents(ops, packed, latentHeight, latentWidth)),
          "f32",
        ))
    );
  }

  /**
   * The modulations of several steps.
   *
   * @param pooled CLIP's pooled output `[batch, pooled_projection_dim]`. @param timesteps of the steps, 0 to 1000.
   * @returns `[timesteps * batch, modulations]`, those of one step behind one another.
   */
  #modulations(pooled: Tensor, timesteps: readonly number[], guidanceScale: number): Tensor {
    const { plan: { device, ops, weights, execute }, model: { configs: { transformer: config } } } = this;
    const [batch] = pooled.shape;
    const rows = timesteps.length * batch;
    return device.scope(() => {
      const times = Float32Array.from(
        { length: rows },
        (_, row) => timesteps[Math.floor(row / batch)] / 1000,
      );
      const inputs = [ops.concat(timesteps.map(() => pooled), 0), Tensor.fromFloat32(device, times, [rows])];
      if (config.guidance_embeds) inputs.push(filled(device, rows, guidanceScale));
      return execute(
        this.plan,
        "modulations",
        inputs,
        ([pooledProjections, timestep, guidance]) =>
          fluxModulations(config, weights.transformer, ops, { pooledProjections, timestep, guidance }),
      );
    });
  }

  /** One Euler step. */
  #denoise({ latents, embeds, imageLatents, rotary, modulations, change }: StepInputs): Tensor {
    const { plan: { device, ops, weights, execute }, model: { configs: { transformer: config } } } = this;
    return execute(
      this.plan,
      "transformer",
      [
        latents,
        embeds,
        modulations,
        rotary.cos,
        rotary.sin,
        filled(device, 1, change),
        ...(imageLatents === undefined ? [] : [imageLatents]),
      ],
      ([latents, encoderHiddenStates, modulations, cos, sin, step, imageLatents]) => {
        const velocity = fluxTransformer(config, weights.transformer, ops, {
          hiddenStates: withReference(ops, latents, imageLatents),
          encoderHiddenStates,
          modulations,
          rotary: { cos, sin },
          wantedTokens: latents.shape[1],
        });
        return ops.eulerStep(latents, velocity, step);
      },
    );
  }

  /** Rotary tables for pictures; those of the last size are kept, and go when nothing refers to them any more. */
  #rotary(textTokens: number, grids: readonly TokenGrid[]): Rotary {
    const size = JSON.stringify([textTokens, grids]);
    if (this.#lastRotary?.size !== size) {
      const { axes_dims_rope: axes } = this.model.configs.transformer;
      const ids = positionIds(textTokens, grids);
      this.#lastRotary = { size, rotary: rotaryEmbedding(this.plan.device, ids, axes, "weights") };
    }
    return this.#lastRotary.rotary;
  }

  /** The picture to edit, as the autoencoder takes it. */
  #reference({ image, autoResize = true }: GenerateOptions): Picture | undefined {
    if (image === undefined) return undefined;
    const { name, kontext, configs } = this.model;
    if (!kontext) {
      throw new UsageError(`${name} is no FLUX.1-Kontext: it draws from a prompt, and edits no picture`, {
        hint: "leave the picture out, or take a FLUX.1-Kontext checkpoint",
      });
    }
    const { width, height, rgb } = image;
    if (!(width > 0 && height > 0 && rgb.length === width * height * 3)) {
      throw new UsageError(
        `the picture to edit has ${rgb.length} bytes, not those of ${width} x ${height} RGB pixels`,
      );
    }
    const multiple = 2 * spatialFactor(configs.vae);
    if (!autoResize && Math.min(width, height) < multiple) {
      throw new UsageError(
        `the picture to edit has ${width} x ${height} pixels: give ${multiple} or more each`,
      );
    }
    return fitReference(image, multiple, autoResize);
  }

  /** Fills in the defaults and checks the values. */
  #settings(options: GenerateOptions, image: Picture | undefined): GenerateResult["settings"] {
    const { configs, t5Tokenizer, kontext } = this.model;
    const guided = configs.transformer.guidance_embeds;
    const multiple = 2 * spatialFactor(configs.vae);
    const side = (name: "height" | "width") => {
      const asked = positiveInteger(name, options[name] ?? configs.vae.sample_size, MAX_SIDE);
      const size = asked - asked % multiple;
      if (size === 0) throw new UsageError(`${name} is ${asked}: give ${multiple} or more`);
      if (size !== asked) {
        options.onWarning?.(`${name} ${asked} is no multiple of ${multiple}: using ${size}`);
      }
      return size;
    };
    const maxSequenceLength = positiveInteger(
      "maxSequenceLength",
      options.maxSequenceLength ?? Math.min(guided ? MAX_SEQUENCE_LENGTH : 256, t5Tokenizer.modelMaxLength),
      MAX_SEQUENCE_LENGTH,
    );
    const guidanceScale = options.guidanceScale ?? (kontext ? 2.5 : 3.5);
    if (!Number.isFinite(Math.fround(1000 * guidanceScale))) { // the transformer embeds 1000 times the scale
      throw new UsageError(`guidanceScale is ${guidanceScale}: give a number, mostly 1 to 30`);
    }
    if (!guided && options.guidanceScale !== undefined && options.guidanceScale !== 0) {
      options.onWarning?.(
        `${this.model.name} has no guidance embedding: guidance scale ${guidanceScale} has no effect`,
      );
    }
    const [height, width] = [side("height"), side("width")];
    if (image !== undefined && options.height === undefined && options.width === undefined) {
      const shape = image.width / image.height;
      if (Math.abs(Math.log(shape * height / width)) > 0.05) {
        options.onWarning?.(
          `the picture to edit is ${image.width} x ${image.height}, and ${width} x ${height} is drawn: for the same ` +
            `shape give width ${image.width} and height ${image.height}`,
        );
      }
    }
    return {
      height,
      width,
      numInferenceSteps: positiveInteger(
        "numInferenceSteps",
        options.numInferenceSteps ?? options.sigmas?.length ?? (guided ? 28 : 4),
        MAX_STEPS,
      ),
      guidanceScale: guided ? guidanceScale : 0,
      seed: new Generator(options.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]).seed,
      maxSequenceLength,
      ...(image && { image: { width: image.width, height: image.height } }),
    };
  }
}

function listOf(value: string | readonly string[]): readonly string[] {
  return typeof value === "string" ? [value] : value;
}

function positiveInteger(name: string, value: number, limit: number): number {
  if (!Number.isInteger(value) || value < 1 || value > limit) {
    throw new UsageError(`${name} is ${value}: give a whole number from 1 to ${limit}`);
  }
  return value;
}

/** Each sample of a batch `images` times, one behind the other. */
function repeated(ops: Ops, x: Tensor, images: number): Tensor {
  return ops.concat(
    Array.from({ length: x.shape[0] * images }, (_, i) => x.narrow(0, Math.floor(i / images), 1)),
    0,
  );
}

/** NaN in a result would become a black picture: throws {@link ModelError} instead. */
async function requireFinite(part: string, answer: FiniteAnswer): Promise<void> {
  if (await answer.read()) return;
  throw new ModelError(`${part} gave NaN or infinity: weights are damaged, or a number overflowed`, {
    hint: "download the weights again; if that does not help, try float32 (--disable_bf16)",
  });
}

function filled(device: Device, count: number, value: number): Tensor {
  return Tensor.fromFloat32(device, new Float32Array(count).fill(value), [count]);
}

function tokenize(
  encoder: string,
  tokenizer: TextTokenizer,
  prompts: readonly string[],
  maxLength: number,
  onWarning?: (message: string) => void,
): Int32Array[] {
  return prompts.map((prompt) => {
    const { ids, truncated } = tokenizer.encode(prompt, maxLength);
    if (truncated !== undefined) {
      onWarning?.(
        `${encoder} reads at most ${maxLength} tokens; this part was cut off: ${JSON.stringify(truncated)}`,
      );
    }
    return ids;
  });
}

function idTensor(device: Device, rows: readonly Int32Array[]): Tensor {
  return Tensor.fromInt32(device, rows.flatMap((row) => [...row]), [rows.length, rows[0].length]);
}
