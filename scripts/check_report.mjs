// Looks at reports as browsers and screen readers do: valid HTML, no finding of axe-core, size, pictures to look at.
//
//     npm install --prefix /tmp/axe axe-core puppeteer-core html-validate
//     NODE_PATH=/tmp/axe/node_modules node scripts/check_report.mjs runs/photos/report.html --pictures docs/pictures/report
//
// Needs Chromium (CHROMIUM=path, by default /usr/bin/chromium). Each page is opened on a phone and on a desk, light and
// dark; a page that scrolls sideways is a fault too. Ends with 1 where something is wrong.

import { createRequire } from "module";
import { readFileSync, statSync } from "fs";
import { resolve } from "path";

const require = createRequire(process.env.NODE_PATH + "/");
const puppeteer = require("puppeteer-core");
const { HtmlValidate } = require("html-validate");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const LARGEST = 3e6; // bytes
const SCREENS = { phone: [390, 844], desk: [1280, 900] };

const words = process.argv.slice(2);
const at = words.indexOf("--pictures");
const pictures = at >= 0 ? words.splice(at, 2)[1] : null;
let wrong = 0;
const say = (page, what) => { wrong += 1; console.log(`${page}: ${what}`); };

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"],
});
const validator = new HtmlValidate({
  extends: ["html-validate:standard"],
  rules: { "no-inline-style": "off", "no-trailing-whitespace": "off", "long-title": "off" },
});
for (const file of words) {
  const size = statSync(file).size;
  console.log(`${file}: ${(size / 1e3).toFixed(0)} kB`);
  if (size > LARGEST) say(file, "more than 3 MB");
  const report = await validator.validateString(readFileSync(file, "utf8"));
  for (const message of report.results.flatMap((result) => result.messages))
    if (message.severity === 2) say(file, `line ${message.line}: ${message.message} (${message.ruleId})`);
  for (const [screen, [width, height]] of Object.entries(SCREENS))
    for (const scheme of ["light", "dark"]) {
      const page = await browser.newPage();
      await page.setBypassCSP(true); // axe is a script, which the page itself allows nowhere
      await page.setViewport({ width, height, deviceScaleFactor: screen === "phone" ? 2 : 1 });
      await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await page.goto("file://" + resolve(file));
      if (await page.evaluate(() => document.documentElement.scrollWidth > window.innerWidth + 1))
        say(file, `${screen}: the page scrolls sideways`);
      await page.evaluate(axe);
      const found = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
      for (const each of found.violations)
        say(file, `${screen}, ${scheme}: ${each.impact}, ${each.id}: ${each.help} (${each.nodes[0].target})`);
      if (pictures)
        await page.screenshot({ path: `${pictures}-${screen}-${scheme}.png`, fullPage: process.env.WHOLE === "1" });
      await page.close();
    }
}
await browser.close();
console.log(wrong ? `${wrong} findings` : "nothing found");
process.exit(wrong ? 1 : 0);
