// Collects the licences of what is bundled, which go into each page and into the package, and notes
// in the bundle which sources it is of.

import { createHash } from "node:crypto";
import { appendFileSync, readFileSync, readdirSync, writeFileSync } from "node:fs";

const names = Object.keys(JSON.parse(readFileSync("package.json", "utf8")).dependencies);
// What these bring with them in their own bundles.
const all = [...names, "@dagrejs/graphlib"].sort();
const texts = all.map((name) => {
  const folder = `node_modules/${name}`;
  const { version, license } = JSON.parse(readFileSync(`${folder}/package.json`, "utf8"));
  return `${name} ${version} (${license})\n\n${readFileSync(`${folder}/LICENSE`, "utf8").trim()}\n`;
});
writeFileSync("../autoparallel/view/html/LICENCES.txt", texts.join(`\n${"-".repeat(80)}\n\n`));

const sources = createHash("sha256");
for (const name of ["package.json", ...readdirSync("src").sort().map((file) => `src/${file}`)]) {
  sources.update(readFileSync(name));
}
appendFileSync("../autoparallel/view/html/page.js", `//sources ${sources.digest("hex")}\n`);
